"""ZeRO-1 with bf16 weights and fp32 accumulation (`BF16_Optimizer`).

DeepSpeed 0.19.8, `runtime/bf16_optimizer.py`: every rank keeps the whole gradient in fp32
(`fp32_groups_gradients_flat`), all-reduced at the boundary, and steps on its own slice
`fp32_groups_gradient_flat_partition`. Only that slice is kept and scaled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds.zero.engines.base import GradientShards, Span, cut, merge_spans


class BF16Shards(GradientShards):
    """This rank's slice of the fp32 gradient."""

    def __init__(self, engine: Any, shared: set[int]):
        super().__init__(engine, shared)
        masters = self.optimizer.fp32_groups_flat_partition
        self.sizes = [master.numel() for master in masters]
        self.device, self.dtype = masters[0].device, masters[0].dtype
        self.spans = self._find_spans()
        self.pieces = merge_spans(self.spans, self.sizes, shared)
        self._norm: Tensor | None = None

    def _find_spans(self) -> list[Span]:
        spans = []
        for group, params in enumerate(self.optimizer.bf16_groups):
            size = self.sizes[group]
            first = torch.distributed.get_rank(self.optimizer.real_dp_process_group[group]) * size
            position = 0
            for param in params:
                start, end = max(position - first, 0), min(position + param.numel() - first, size)
                if start < end:
                    spans.append(Span(param, group, start, end - start))
                position += param.numel()
        return spans

    def begin_task(self) -> None:
        pass

    def take(self) -> list[Tensor]:
        return cut(self.optimizer.fp32_groups_gradient_flat_partition, self.pieces)

    def release(self) -> None:
        self.optimizer.clear_hp_grads()

    def put(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for gradient, flat in zip(self.optimizer.fp32_groups_gradient_flat_partition, flats, strict=True):
            gradient.copy_(flat)
        for flags in self.optimizer.fp32_groups_has_gradients:
            flags[:] = [True] * len(flags)
        square = torch.stack([flat.norm() for flat in flats]).square().sum()
        torch.distributed.all_reduce(square, group=self.optimizer.dp_process_group)
        self._norm = square.sqrt()

    def after_step(self) -> None:
        # the engine sees only this rank's slice; other slices are zero, so its own figure is a rank's share
        if self._norm is not None:
            self.optimizer._global_grad_norm = self.engine._global_grad_norm = self._norm
            self._norm = None

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        master = self.optimizer.fp32_groups_flat_partition[span.group]
        return master, self.optimizer.optimizer.state[master]
