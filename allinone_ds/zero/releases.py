"""Differences between the releases of DeepSpeed 0.19, from the sources of 0.19.0 to 0.19.8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
from packaging.version import Version
from torch import Tensor

RELEASE = Version(Version(deepspeed.__version__).base_version)
COALESCES = RELEASE >= Version("0.19.1")
"""`engine.coalesce_grad_reduction` exists."""
RELEASES_LEFTOVERS = RELEASE >= Version("0.19.3")
"""`PartitionedParameterCoordinator.release_backward_leftovers` exists."""
MANAGES_ACCUMULATION = RELEASE >= Version("0.19.4")
"""The config key `managed_gradient_accumulation` exists."""
SERVES_MUON = RELEASE >= Version("0.19.8")
"""The iteration and the switches of Muon are those that were read."""
COMPACT = RELEASE >= Version("0.19.8")
"""ZeRO-1/2 keep fp32 gradients of 16-bit weights in one flat buffer per group, and copy to the CPU asynchronously."""


def uses_flat_partition(optimizer: Any) -> bool:
    """Return whether `averaged_gradients[group]` of a ZeRO-1/2 optimizer has one `flat_partition`."""
    return COMPACT and bool(optimizer._use_compact_grad_partition_buffer(0))


def as_partition(flat: Tensor, views: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return a group's gradient shard in the form that a ZeRO-1/2 step reads, without a copy where possible.

    Args:
        flat: the shard.
        views: of it, each of one or several parameters; padding is in none of them.
    """
    if not COMPACT:
        return [flat]
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

    return GradPartitionBufferGroup(views, flat)


def wait_for_offload_copies(optimizer: Any) -> None:
    """Wait until gradients that are being copied to the CPU have arrived."""
    if COMPACT:
        optimizer._wait_for_offload_copies()
