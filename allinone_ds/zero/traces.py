"""One parameter trace a task under ZeRO-3, so that prefetching survives the switch from one head to another.

DeepSpeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py`: a coordinator records the order of modules in one
forward and backward, and prefetches along it from then on; a forward that takes another head throws the record away,
and every parameter is fetched when it is needed. Coordinators share one stream and one registry of parameters in
flight and hold nothing once a backward is over, so each task gets its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

from deepspeed.runtime.zero.config import OffloadDeviceEnum
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from .releases import RELEASES_LEFTOVERS


class ParameterTraces:
    """The traces of one engine; does nothing on engines that do not partition parameters.

    Args:
        engine: a DeepSpeedEngine.
    """

    def __init__(self, engine: Any):
        self._offload: Any = getattr(engine.optimizer, "parameter_offload", None)
        self._of: dict[Hashable, PartitionedParameterCoordinator] = {}

    @contextlib.contextmanager
    def use(self, key: Hashable) -> Iterator[None]:
        """Inside the block forwards and backwards are recorded, and prefetched, along the trace of `key`."""
        if self._offload is None:
            yield
            return
        before = self._offload.param_coordinator
        mine = self._of.pop(key, None) or self._new()
        self._offload.param_coordinator = mine
        try:
            yield
            self._of[key] = mine
        except BaseException:  # a broken pass: this trace is recorded anew
            if RELEASES_LEFTOVERS:
                mine.release_backward_leftovers()
            raise
        finally:
            self._offload.param_coordinator = before

    def _new(self) -> PartitionedParameterCoordinator:
        like = self._offload
        return PartitionedParameterCoordinator(
            prefetch_bucket_sz=like._prefetch_bucket_sz,
            max_reuse_distance_in_numel=like._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=like._max_available_parameters_in_numel,
            allgather_stream=like._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=like.module.ds_inflight_param_registry,
            prefetch_nvme=like.offload_device == OffloadDeviceEnum.nvme,
            timers=like.timers,
            zero_quantized_weights=like.zero_quantized_weights,
            zero_quantized_nontrainable_weights=like.zero_quantized_nontrainable_weights,
            fast_sharding_for_leaf_module=like.fast_sharding_for_leaf_module,
            log_trace_cache_warnings=like.log_trace_cache_warnings,
        )
