"""ZeRO-3 (`DeepSpeedZeroOptimizer_Stage3`), optimizer on the accelerator or offloaded to the CPU.

Private fields of DeepSpeed 0.19.8, `runtime/zero/stage3.py`: every parameter's partition of the reduced gradient is a
view of `grad_partitions_flat_buffer`, in the order of `fp16_groups`. `partition_grads` overwrites a view in the first
micro-step of a step and adds in later ones, and leaves parameters without a gradient alone; so the buffer is zeroed
after each task and a micro-step counts from 0 in each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter

from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.pieces import Span, cut
from allinone_ds.zero.fragments import Fragment, fragments_of_parameters
from allinone_ds.zero.params import forget_copies


class Stage3Adapter(EngineAdapter):
    """ZeRO-3 with the optimizer on the accelerator."""

    keeps_local_gradients = True
    _backwards = 0
    """Backwards of the current task."""
    _counters: Sequence[tuple[Any, dict[str, int]]] = ()
    """Modules and their counters, while a graph is kept for further backwards."""

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3

    def _shard_sizes(self) -> list[int]:
        return [sum(int(p.partition_numel()) for p in group) for group in self.optimizer.fp16_groups]

    def _find_spans(self) -> list[Span]:
        spans = []
        for group, params in enumerate(self.optimizer.fp16_groups):
            start = 0
            for param in params:
                spans.append(Span(param, group, start, int(param.partition_numel())))
                start += int(param.partition_numel())
        return spans

    def begin_task(self) -> None:
        self._backwards = 0
        self.optimizer.micro_step_id = 0
        self.optimizer._epilogue_ran_this_backward = False

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        # DeepSpeed counts micro-steps in `engine.forward`; a loss may come from `engine.module`, or from a forward
        # before an earlier backward, and its gradient would then overwrite the one that it should be added to
        self.optimizer.micro_step_id = self._backwards
        if retain_graph and not self._counters:
            self._counters = [(module, _counters(module)) for module in self.engine.module.modules()]
        super().backward(loss, retain_graph)
        self._backwards += 1
        # hooks fetch and release a module's weights as often as its forward ran, so those of a second backward of the
        # same graph would leave weights that are not retained partitioned
        for module, counters in self._counters:
            module.__dict__.update(counters if retain_graph else dict.fromkeys(counters, 0))
        if not retain_graph:
            self._counters = ()

    def gradient(self) -> list[Tensor]:
        return cut(self.optimizer.grad_partitions_flat_buffer.split(self.sizes), self.pieces)

    def clear_gradient(self) -> None:
        self.optimizer.grad_partitions_flat_buffer.zero_()

    def _set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for group, flat in enumerate(flats):
            self.optimizer.averaged_gradients[group] = self.runs(group, flat)
        self._show_overflow(overflow)

    def _show_overflow(self, overflow: bool) -> None:
        """Leave what the engine's step looks at, on a stream of its own, to learn whether a gradient overflowed."""
        if overflow:
            self.optimizer.grad_partitions_flat_buffer[0] = torch.inf
        stream = self.optimizer.reduce_and_partition_stream
        if stream is not None:
            stream.wait_stream(get_accelerator().current_stream())

    def _after_step(self) -> None:
        if self.optimizer.overflow:
            self.clear_gradient()

    def reduce_accumulated(self) -> None:
        self.set_reduces(True)
        self.optimizer.finalize_gradient_accumulation_boundary()  # every backward has reduced its part

    def _discard(self) -> None:
        self._counters = ()
        self.clear_gradient()
        self.synchronize()  # buffers are reused on other streams
        for group in self.optimizer.fp16_groups:
            for param in group:
                param.grad = None  # `optimizer.zero_grad` asks a gradient on the CPU for its stream, which raises
        for bucket in self.optimizer.ipg_buckets.values():
            bucket.clear_params()

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def model_groups(self) -> list[list[Parameter]]:
        return self.optimizer.fp16_groups

    def publish_masters(self) -> None:
        for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._partitions_changed([param for group in self.optimizer.fp16_groups for param in group])

    def fragments(self) -> list[Fragment]:
        group = self.optimizer.dp_process_group
        rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        return fragments_of_parameters(self.engine._get_zero_param_shapes(), rank, world)

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        master = self.optimizer.fp32_partitioned_groups_flat[span.group]
        return master, self.optimizer.optimizer.state[master]

    def weights(self, param: Parameter) -> list[Tensor]:
        return [_partition(param).data]

    def _weights_restored(self, params: Sequence[Parameter]) -> None:
        # small parameters stay gathered, and were gathered again at the end of the step with the moved values
        self._partitions_changed(params)

    def _partitions_changed(self, params: Sequence[Any]) -> None:
        """Let every later use of `params` see their partitions as they are now. Collective."""
        stream = self.optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        if stream is not None:  # weights are gathered on a stream of their own
            stream.wait_stream(get_accelerator().current_stream())
        gathered = [p for p in params if getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(gathered, has_been_updated=False)
        forget_copies(self.engine)  # those that `partition` just made of the old values too
        if gathered:
            gathered[0].all_gather(gathered)


class Stage3OffloadAdapter(Stage3Adapter):
    """ZeRO-3 with the optimizer on the CPU; its step reads `fp32_partitioned_groups_flat[group].grad`."""

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return super().serves(engine) and bool(engine.optimizer.offload_optimizer)

    def _set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for master, flat in zip(self.optimizer.fp32_partitioned_groups_flat, flats, strict=True):
            master.grad.view(-1).copy_(flat)
        self.optimizer.norm_for_param_grads = self.norms(flats)
        self._show_overflow(overflow)

    def _discard(self) -> None:
        super()._discard()
        self.optimizer.reset_cpu_buffers()
        for master in self.optimizer.fp32_partitioned_groups_flat:
            master.grad.zero_()


def _counters(module: Any) -> dict[str, int]:
    """Return how often the hooks of a module still fetch and release its weights (`runtime/zero/parameter_offload`)."""
    names = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


def _partition(param: Any) -> Any:
    """This rank's partition of a ZeRO-3 parameter."""
    return param.ds_tensor
