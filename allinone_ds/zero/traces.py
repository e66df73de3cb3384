"""One parameter trace per task under ZeRO-3, and weights that stay gathered from task to task.

DeepSpeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py`: a coordinator records the order of modules in one
forward and backward, and prefetches parameters in this order from then on. A forward through a different head discards
the record, and every parameter is then fetched when it is needed. Coordinators share one stream and one registry of
parameters in flight and hold nothing after a backward, so each task can have its own.

A coordinator releases weights after their last use in its trace, though the next task needs the same backbone, which no
optimizer step has moved. The coordinators here can keep weights until `partition`, so that a step gathers them once,
not twice per micro-step. Weights that `GatheredParameters` partitions in between are gathered again when needed.

A module that reads a weight of another one, as `peft` does in its layers, is recorded as its second owner at that
moment, for all traces. Those that were recorded before expect fewer weights there, and a coordinator raises an error.
The coordinators here discard such a trace, and record it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

from deepspeed.runtime.zero.config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from allinone_ds.zero.releases import RELEASES_LEFTOVERS


class _Coordinator(PartitionedParameterCoordinator):
    """A coordinator that can keep weights gathered.

    Attributes:
        kept: `ds_id` -> parameter, of those that it does not release.
    """

    kept: Mapping[int, Any] = MappingProxyType({})
    _further: Sequence[int] | None = None
    """Number of weights of other modules that each module of the recorded trace had."""

    def _PartitionedParameterCoordinator__release_param(self, param: Any, *options: Any) -> None:
        if param.ds_id not in self.kept:
            super()._PartitionedParameterCoordinator__release_param(param, *options)

    def reset_step(self) -> None:
        """Begin a forward and backward with what is kept counted, so that prefetches stay within the live limit."""
        super().reset_step()
        if self._further is None and self.is_complete_trace():
            self._further = [
                _weights_of_others(module) for module in self._PartitionedParameterCoordinator__submodule_order
            ]
        gathered = (p.ds_numel for p in self.kept.values() if p.ds_status == ZeroParamStatus.AVAILABLE)
        self._PartitionedParameterCoordinator__n_available_params = sum(gathered)

    def trace_prologue(self, sub_module: Any) -> None:
        """Discard the trace if it does not know a module, or weights of other modules that it has had since."""
        super().trace_prologue(sub_module)
        if self._further is not None and self.is_complete_trace():
            if self._further[self._PartitionedParameterCoordinator__step_id] != _weights_of_others(sub_module):
                self._invalidate_trace()

    def _invalidate_trace(self) -> None:
        self._further = None
        super()._invalidate_trace()

    def release_and_reset_all(self, module: Any) -> None:
        """Release all weights, also those that it keeps: a checkpoint is saved in the middle of a step."""
        kept, self.kept = self.kept, {}
        try:
            super().release_and_reset_all(module)
        finally:
            self.kept = kept


def _weights_of_others(module: Any) -> int:
    return len(getattr(module, "_external_params", ()))


class ParameterTraces:
    """The traces of one engine. Does nothing on engines that do not partition parameters.

    Args:
        engine: a DeepSpeedEngine.
        shared: `id` of every trainable parameter of the backbone.
        enabled: False: leave DeepSpeed's one trace as it is.
    """

    def __init__(self, engine: Any, shared: AbstractSet[int] = frozenset(), enabled: bool = True):
        self._offload: Any = getattr(engine.optimizer, "parameter_offload", None) if enabled else None
        self._of: dict[Hashable, _Coordinator] = {}
        self._params: list[Any] = [] if self._offload is None else list(self._offload.module.parameters())
        self._kept = self._choose_kept(shared)

    def _choose_kept(self, shared: AbstractSet[int]) -> dict[int, Any]:
        """Return the parameters, by `ds_id`, that `use(key, keep=True)` keeps gathered.

        All of them if they are within stage3_max_live_parameters and half of stage3_max_reuse_distance, which spans a
        forward and its backward. Else the last layers of what every task uses, which are those that DeepSpeed itself
        would keep from a forward to its backward, less room for one prefetch.
        """
        if self._offload is None:
            return {}
        live, reuse = self._offload._max_available_parameters_in_numel, self._offload._max_reuse_distance_in_numel
        if sum(int(p.ds_numel) for p in self._params) <= min(live, reuse // 2):
            return {p.ds_id: p for p in self._params}
        left = min(live - self._offload._prefetch_bucket_sz, reuse // 2)
        kept = {}
        for param in reversed(self._params):
            if id(param) in shared or not param.requires_grad:
                left -= int(param.ds_numel)
                if left < 0:
                    break
                kept[param.ds_id] = param
        return kept

    @contextlib.contextmanager
    def use(self, key: Hashable, keep: bool = False) -> Iterator[None]:
        """Record, and prefetch along, the trace of `key` in the forwards and backwards inside this block.

        Args:
            key: of the trace.
            keep: leave weights gathered until `partition`, as many as DeepSpeed's limits allow.
        """
        if self._offload is None:
            yield
            return
        before = self._offload.param_coordinator
        mine = self._of.pop(key, None) or self._new()
        mine.kept = self._kept if keep else {}
        self._offload.param_coordinator = mine
        try:
            yield
            self._of[key] = mine
        except BaseException:  # after an error the trace is recorded again
            if RELEASES_LEFTOVERS:
                mine.release_backward_leftovers()
            for param in self._params:
                param.ds_active_sub_modules.clear()  # of modules whose forward or backward did not end
            raise
        finally:
            self._offload.param_coordinator = before

    def partition(self) -> None:
        """Partition all gathered parameters, before an optimizer step that would not update a gathered copy."""
        gathered = [p for p in self._params if p.ds_status == ZeroParamStatus.AVAILABLE and not p.ds_persist]
        if gathered:
            gathered[0].partition(gathered, has_been_updated=False)

    def _new(self) -> _Coordinator:
        like = self._offload
        return _Coordinator(
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
