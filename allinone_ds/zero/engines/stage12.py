"""ZeRO-1 and ZeRO-2 (`DeepSpeedZeroOptimizer`), optimizer on the accelerator or offloaded to the CPU.

Private fields of DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py`: `averaged_gradients[group]` holds the reduced shard
after a backward at the accumulation boundary, as a list of tensors (views of gradients, then padding) or, where
gradients accumulate in fp32 beside 16-bit weights, as a `GradPartitionBufferGroup` with one `flat_partition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor

from allinone_ds.zero.engines.base import GradientShards, Piece, Span, cut, merge_spans
from allinone_ds.zero.releases import as_partition, uses_flat_partition, wait_for_offload_copies


class Stage12Shards(GradientShards):
    """Shards of ZeRO-1 and ZeRO-2 with the optimizer on the accelerator."""

    def __init__(self, engine: Any, shared: set[int]):
        super().__init__(engine, shared)
        masters = self.optimizer.single_partition_of_fp32_groups
        self.sizes = [int(size) for size in self.optimizer.partition_size]
        self.device, self.dtype = masters[0].device, masters[0].dtype
        self.spans = self._find_spans()
        self.pieces = merge_spans(self.spans, self.sizes, shared) if self._flat() else self._pieces_by_tensor()

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
        """One piece a tensor of `averaged_gradients`: the parameters in order, padding where there is any."""
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

    def take(self) -> list[Tensor]:
        shards = [self.optimizer.averaged_gradients[group] for group in range(len(self.sizes))]
        if self._flat():
            return cut([shard.flat_partition for shard in shards], self.pieces)
        tensors = [tensor.reshape(-1) for shard in shards for tensor in shard]
        if [t.numel() for t in tensors] != [piece.length for piece in self.pieces]:
            raise RuntimeError(
                "DeepSpeed's gradient shard does not have the layout this release of allinone_ds knows "
                f"({len(tensors)} tensors, expected {len(self.pieces)}); use a checked DeepSpeed release"
            )
        return tensors

    def release(self) -> None:
        for group in range(len(self.sizes)):
            self.optimizer.averaged_gradients[group] = None
            self.optimizer.all_grad_tensors[group] = None

    def put(self, flats: Sequence[Tensor], overflow: bool) -> None:
        if overflow:
            flats[0][0] = torch.inf
        for group, flat in enumerate(flats):
            self.optimizer.averaged_gradients[group] = as_partition(flat)

    def discard(self) -> None:
        self.release()
        self.begin_task()
        self.optimizer.zero_grad(set_to_none=True)
        for bucket in self.optimizer.ipg_buckets.values():  # filled when a backward broke off
            bucket.clear()
        self.optimizer.params_already_reduced = [False] * len(self.optimizer.params_already_reduced)
        self.optimizer._release_ipg_buffers()

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        master = self.optimizer.single_partition_of_fp32_groups[span.group]
        return master, self.optimizer.optimizer.state[master]


class Stage12OffloadShards(Stage12Shards):
    """Shards of ZeRO-1 and ZeRO-2 with the optimizer on the CPU: the reduced shard is the fp32 gradient there.

    The engine writes a parameter's gradient only when it got one, and adds onto what earlier micro-steps left in
    `accumulated_grads_in_cpu`; both are cleared between tasks, or a head would be applied again.
    """

    def _flat(self) -> bool:
        return True

    def _gradients(self) -> list[Tensor]:
        return [master.grad.view(-1) for master in self.optimizer.single_partition_of_fp32_groups]

    def begin_task(self) -> None:
        super().begin_task()
        wait_for_offload_copies(self.optimizer)
        for buffer in self.optimizer.accumulated_grads_in_cpu.values():
            buffer.zero_()
        for gradient in self._gradients():
            gradient.zero_()

    def take(self) -> list[Tensor]:
        wait_for_offload_copies(self.optimizer)
        return cut(self._gradients(), self.pieces)

    def release(self) -> None:
        super().release()
        self.optimizer.reset_cpu_buffers()
        for gradient in self._gradients():
            gradient.zero_()

    def put(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for gradient, flat in zip(self._gradients(), flats, strict=True):
            gradient.copy_(flat)
        self.optimizer.norm_for_param_grads = self.norms(flats)
        self.optimizer.local_overflow = overflow
