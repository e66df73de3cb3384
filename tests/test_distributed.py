"""Process groups live as long as they must, and a rank that waits for its GPU can look elsewhere."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from allinone_ds import distributed
from allinone_ds.distributed import extend_timeouts, wait_for_device


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


def test_a_gpu_is_waited_for_as_long_as_it_takes_and_in_short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a rank can look whether others have failed, for which an operation of NCCL would wait."""
    done = iter([False] * 3 + [True] * 5)
    recorded: list[bool] = []

    class Event:
        def record(self) -> None:
            recorded.append(True)

        def query(self) -> bool:
            return next(done)

    looks: list[bool] = []

    def wait(work: Any) -> None:
        while not looks or looks[-1]:
            try:
                work.wait(timedelta(seconds=-1))
                looks.append(False)
            except RuntimeError:
                looks.append(True)
        assert work.looks > 1e9

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    wait_for_device(wait, torch.device("cpu"))
    assert not looks and not recorded
    wait_for_device(wait, torch.device("cuda"))
    assert looks == [True, True, True, False] and recorded == [True]
