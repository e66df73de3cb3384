"""Engines without ZeRO: the whole averaged gradient is in `param.grad` on every rank.

fp32 runs the user's own optimizer; 16-bit weights run DeepSpeed's `FP16_Optimizer` or `FP16_UnfusedOptimizer`
(0.19.8, `runtime/fp16/`), whose fp32 copies are `fp32_groups_flat[group]` or `fp32_groups[group][index]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from allinone_ds.zero.engines.base import GradientShards, Span, merge_spans


class Stage0Shards(GradientShards):
    """The whole gradient, one group a parameter."""

    replicated = True

    def __init__(self, engine: Any, shared: set[int]):
        super().__init__(engine, shared)
        groups = getattr(self.optimizer, "fp16_groups", None)  # 16-bit wrappers: the model's parameters
        if groups is None:
            groups = [group["params"] for group in self.optimizer.param_groups]
        self._where = [(g, j) for g, group in enumerate(groups) for j, p in enumerate(group) if p.requires_grad]
        self._params = [groups[g][j] for g, j in self._where]
        self._offsets = []
        for group in groups:
            position = 0
            for param in group:
                if param.requires_grad:
                    self._offsets.append(position)
                position += param.numel()
        self.sizes = [param.numel() for param in self._params]
        self.device, self.dtype = self._params[0].device, torch.float32
        self.spans = [Span(param, i, 0, param.numel()) for i, param in enumerate(self._params)]
        self.pieces = merge_spans(self.spans, self.sizes, shared)

    @property
    def missing_loss_scale(self) -> float:
        # 0.19.8: engine.backward scales losses for ZeRO only, yet these optimizers divide by the scale all the same
        return self.loss_scale

    def begin_task(self) -> None:
        self.release()

    def take(self) -> list[Tensor]:
        return [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self._params]

    def release(self) -> None:
        for param in self._params:
            param.grad = None

    def put(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for param, flat in zip(self._params, flats, strict=True):
            param.grad = flat.view_as(param).to(param.dtype)
        if overflow and self._params[0].grad is not None:
            self._params[0].grad.view(-1)[0] = torch.inf

    def discard(self) -> None:
        self.release()

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        group, index = self._where[span.group]
        if isinstance(self.optimizer, FP16_Optimizer):
            flat = self.optimizer.fp32_groups_flat[group]
            start = self._offsets[span.group]
            state = self.optimizer.optimizer.state[flat]
            part = {k: v.view(-1)[start : start + span.length] if _flat_state(v, flat) else v for k, v in state.items()}
            return flat.data.view(-1)[start : start + span.length], part
        if isinstance(self.optimizer, FP16_UnfusedOptimizer):
            copy = self.optimizer.fp32_groups[group][index]
            return copy, self.optimizer.optimizer.state[copy]
        return span.param, self.optimizer.state[span.param]


def _flat_state(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() == flat.numel() and value.dim() > 0
