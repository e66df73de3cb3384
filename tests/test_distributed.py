"""Process groups live as long as they must."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from allinone_ds.distributed import extend_timeouts


def test_every_group_gets_the_timeout_also_those_of_other_packages() -> None:
    """DeepSpeed creates its group of all ranks with the default of the backend, 10 minutes with NCCL."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = [dist.group.WORLD, dist.new_group([0], timeout=timedelta(seconds=60)),
                  dist.new_group([0], timeout=timedelta(hours=5))]  # fmt: skip
        extend_timeouts(1200)
        found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        assert [round(seconds) for seconds in found] == [1800, 1200, 5 * 3600]
    finally:
        dist.destroy_process_group()
    extend_timeouts(1200)
