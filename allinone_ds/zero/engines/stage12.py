"""ZeRO-1 and ZeRO-2 (`DeepSpeedZeroOptimizer`), optimizer on the accelerator or offloaded to the CPU.

Private fields of DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py`: `averaged_gradients[group]` holds the reduced shard
after a backward at the accumulation boundary, as a list of tensors (views of gradients, then padding) or, where
gradients accumulate in fp32 beside 16-bit weights, as a `GradPartitionBufferGroup` with one `flat_partition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor
from torch.nn import Parameter

from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.pieces import Piece, Span, cut, merge_spans
from allinone_ds.zero.fragments import Fragment, fragments_of_parts, no_paddings
from allinone_ds.zero.releases import MANAGES_ACCUMULATION, as_partition, uses_flat_partition, wait_for_offload_copies


class Stage12Adapter(EngineAdapter):
    """ZeRO-1 and ZeRO-2 with the optimizer on the accelerator."""

    keeps_local_gradients = True

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return type(engine.optimizer) is DeepSpeedZeroOptimizer

    def _shard_sizes(self) -> list[int]:
        return [int(size) for size in self.optimizer.partition_size]

    @cached_property
    def pieces(self) -> list[Piece]:
        return merge_spans(self.spans, self.sizes, self.shared) if self._flat() else self._pieces_by_tensor()

    def _flat(self) -> bool:
        return uses_flat_partition(self.optimizer)

    def _find_spans(self) -> list[Span]:
        optimizer, spans = self.optimizer, []
        for group, params in enumerate(optimizer.params_in_partition):
            rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
            for param in params:
                key = optimizer.get_param_id(param)
                source = int(optimizer.grad_start_offset[group][rank][key])
                start = int(optimizer.grad_partition_insertion_offset[group][rank][key])
                length = min(param.numel() - source, self.sizes[group] - start)
                spans.append(Span(param, group, start, length))
        return spans

    def _pieces_by_tensor(self) -> list[Piece]:
        """One piece per tensor of `averaged_gradients`: the parameters in order, and padding where there is any."""
        pieces = []
        for group, size in enumerate(self.sizes):
            position = 0
            for span in (s for s in self.spans if s.group == group):
                if span.start > position:
                    pieces.append(Piece(group, position, span.start - position, False))
                pieces.append(Piece(group, span.start, span.length, id(span.param) in self.shared))
                position = span.start + span.length
            if position < size:
                pieces.append(Piece(group, position, size - position, False))
        return pieces

    def begin_task(self) -> None:
        self.optimizer.micro_step_id = INITIAL_MICRO_STEP_ID

    def gradient(self) -> list[Tensor]:
        shards = [self.optimizer.averaged_gradients[group] for group in range(len(self.sizes))]
        if self._flat():
            return cut([shard.flat_partition for shard in shards], self.pieces)
        tensors = [tensor.reshape(-1) for shard in shards for tensor in shard]
        if [t.numel() for t in tensors] != [piece.length for piece in self.pieces]:
            raise RuntimeError(
                "DeepSpeed's gradient shard does not have the layout that this release of allinone_ds knows "
                f"({len(tensors)} tensors, expected {len(self.pieces)}); use a checked DeepSpeed release"
            )
        return tensors

    def clear_gradient(self) -> None:
        for group in range(len(self.sizes)):
            self.optimizer.averaged_gradients[group] = None
            self.optimizer.all_grad_tensors[group] = None

    def _set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        if overflow:
            flats[0][0] = torch.inf
        for group, flat in enumerate(flats):
            self.optimizer.averaged_gradients[group] = as_partition(flat, self.runs(group, flat))

    def reduce_accumulated(self) -> None:
        self.set_reduces(True)
        if self.stage == 2:  # every backward has reduced its part
            self.optimizer.finalize_gradient_accumulation_boundary()
            return
        with self.engine.coalesce_grad_reduction():  # reduces what is there when it ends
            pass

    def _discard(self) -> None:
        self.clear_gradient()
        self.begin_task()
        self._remove_gradients()
        for bucket in self.optimizer.ipg_buckets.values():  # filled by a backward that raised
            bucket.clear()
        self.optimizer.params_already_reduced = [False] * len(self.optimizer.params_already_reduced)
        self.optimizer._release_ipg_buffers()

    def step(self) -> None:
        groups = self.optimizer.optimizer.param_groups
        try:
            super().step()
        finally:  # DeepSpeed steps on one group after another, and an optimizer that raises would keep only that one
            self.optimizer.optimizer.param_groups = groups

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    def model_groups(self) -> list[list[Parameter]]:
        return self.optimizer.bit16_groups

    def publish_masters(self) -> None:
        self.optimizer.update_lp_params()

    def fragments(self) -> list[Fragment]:
        shapes = self.engine._get_zero_param_shapes()
        ranks = [torch.distributed.get_rank(group) for group in self.optimizer.real_dp_process_group]
        parts = [(rank * m.numel(), m.numel()) for rank, m in zip(ranks, self.masters(), strict=True)]
        paddings = getattr(self.optimizer, "round_robin_bit16_padding", None) or no_paddings(shapes)
        return fragments_of_parts(shapes, paddings, parts)

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        master = self.optimizer.single_partition_of_fp32_groups[span.group]
        return master, self.optimizer.optimizer.state[master]


class Stage12OffloadAdapter(Stage12Adapter):
    """ZeRO-1 and ZeRO-2 with the optimizer on the CPU; the reduced shard is the fp32 gradient there.

    The engine writes a parameter's gradient only when it got one, and adds onto what earlier micro-steps left in
    `accumulated_grads_in_cpu`. Both are cleared between tasks, or the gradient of a head would be applied again.
    """

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return super().serves(engine) and bool(engine.optimizer.cpu_offload)

    def _flat(self) -> bool:
        return True

    def _gradients(self) -> list[Tensor]:
        return [master.grad.view(-1) for master in self.optimizer.single_partition_of_fp32_groups]

    def begin_task(self) -> None:
        super().begin_task()
        wait_for_offload_copies(self.optimizer)
        self.optimizer._offload_accumulated_param_ids = set()
        for buffer in self.optimizer.accumulated_grads_in_cpu.values():
            buffer.zero_()
        for gradient in self._gradients():
            gradient.zero_()

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        super().backward(loss, retain_graph)
        last = self.engine.is_gradient_accumulation_boundary()
        if last and self.stage == 2 and MANAGES_ACCUMULATION and self.optimizer._offload_accumulated_param_ids:
            # the last micro-step has copied the sums of the parameters that it used, and of no others
            wait_for_offload_copies(self.optimizer)
            self.optimizer.finalize_gradient_accumulation_boundary()
            self._remove_gradients()

    def gradient(self) -> list[Tensor]:
        wait_for_offload_copies(self.optimizer)
        return cut(self._gradients(), self.pieces)

    def clear_gradient(self) -> None:
        super().clear_gradient()
        self.optimizer.reset_cpu_buffers()
        for gradient in self._gradients():
            gradient.zero_()

    def _set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for gradient, flat in zip(self._gradients(), flats, strict=True):
            gradient.copy_(flat)
        self.optimizer.norm_for_param_grads = self.norms(flats)
        self.optimizer.local_overflow = overflow


class Stage2FlatOffloadAdapter(Stage12OffloadAdapter):
    """ZeRO-2 with the optimizer on the CPU, and 16-bit weights whose gradients add up in fp32.

    Every backward adds its reduced gradient to one flat shard on the accelerator. At an accumulation boundary the
    engine would copy it to the CPU parameter by parameter, and wait for a norm and for a search for inf in each. So no
    backward of a task is at a boundary, and a task's shard is copied as a whole.
    """

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return super().serves(engine) and engine.optimizer.partition_gradients and uses_flat_partition(engine.optimizer)

    def begin_task(self) -> None:
        Stage12Adapter.begin_task(self)  # `gradient` overwrites what an earlier task has left on the CPU

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        self.set_reduces(False)
        EngineAdapter.backward(self, loss, retain_graph)

    def reduce_accumulated(self) -> None:
        pass  # every backward has

    def gradient(self) -> list[Tensor]:
        wait_for_offload_copies(self.optimizer)  # of `LocalGradients.reduce`
        found = []
        for group, gradient in enumerate(self._gradients()):
            shard = self.optimizer.averaged_gradients.get(group)
            if shard is None:  # no parameter of this group took part
                gradient.zero_()
            else:
                found.append((gradient, shard.flat_partition))
        for number, (gradient, flat) in enumerate(found, 1):
            gradient.copy_(flat, non_blocking=number < len(found))  # the last copy waits for all
        return cut(self._gradients(), self.pieces)

    def clear_gradient(self) -> None:
        Stage12Adapter.clear_gradient(self)
        self.optimizer.reset_cpu_buffers()

    def step(self) -> None:
        if not self.optimizer.norm_for_param_grads:  # the engine steps on what `gradient` has copied
            self.optimizer.norm_for_param_grads = self.norms(self._gradients())
        super().step()
