"""Engines without ZeRO: the whole averaged gradient is in `param.grad` on every rank.

fp32 runs the user's own optimizer; 16-bit weights run DeepSpeed's `FP16_Optimizer` or `FP16_UnfusedOptimizer` (0.19.8,
`runtime/fp16/`), whose fp32 copies are `fp32_groups_flat[group]` or `fp32_groups[group][index]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.pieces import Span


class Stage0Adapter(EngineAdapter):
    """ZeRO-0 with the user's own fp32 optimizer; the shard is the whole gradient, one group per parameter."""

    replicated = True

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return isinstance(engine.optimizer, Optimizer) and engine.zero_optimization_stage() == 0

    def __init__(self, engine: Any, shared: AbstractSet[int] = frozenset()):
        super().__init__(engine, shared)
        self.dtype = torch.float32  # whatever the dtype of the parameters is

    @cached_property
    def _positions(self) -> list[tuple[int, int]]:
        """(group, index in it) of every trainable parameter."""
        groups = enumerate(self._optimizer_groups())
        return [(g, j) for g, group in groups for j, param in enumerate(group) if param.requires_grad]

    @cached_property
    def _params(self) -> list[Parameter]:
        groups = self._optimizer_groups()
        return [groups[g][j] for g, j in self._positions]

    def _shard_sizes(self) -> list[int]:
        return [param.numel() for param in self._params]

    def _optimizer_groups(self) -> list[list[Parameter]]:
        """The model's parameters, per group of the optimizer."""
        return [list(group["params"]) for group in self.optimizer.param_groups]

    def model_groups(self) -> list[list[Parameter]]:
        return [[param] for group in self._optimizer_groups() for param in group]

    def _find_spans(self) -> list[Span]:
        return [Span(param, i, 0, param.numel()) for i, param in enumerate(self._params)]

    def begin_task(self) -> None:
        self.clear_gradient()

    def gradient(self) -> list[Tensor]:
        return [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self._params]

    def clear_gradient(self) -> None:
        for param in self._params:
            param.grad = None

    def _set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for param, flat in zip(self._params, flats, strict=True):
            param.grad = flat.view_as(param).to(param.dtype)
        if overflow and self._params[0].grad is not None:
            self._params[0].grad.view(-1)[0] = torch.inf

    def _discard(self) -> None:
        self.clear_gradient()

    def masters(self) -> list[Tensor]:
        return [param for group in self._optimizer_groups() for param in group]

    def publish_masters(self) -> None:
        pass  # the optimizer steps on the model's own weights

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        return span.param, self.optimizer.state[span.param]


class _HalfAdapter(Stage0Adapter):
    """ZeRO-0 with 16-bit weights, of which DeepSpeed's optimizer keeps fp32 copies."""

    @property
    def missing_loss_scale(self) -> float | Tensor:
        # 0.19.8: engine.backward scales losses for ZeRO only, yet these optimizers divide by the scale all the same
        return self.loss_scale

    def _optimizer_groups(self) -> list[list[Parameter]]:
        return self.optimizer.fp16_groups


class FusedHalfAdapter(_HalfAdapter):
    """ZeRO-0 through `FP16_Optimizer`: one flat fp32 copy per group."""

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return type(engine.optimizer) is FP16_Optimizer

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_groups_flat)

    def model_groups(self) -> list[list[Parameter]]:
        return self._optimizer_groups()

    def publish_masters(self) -> None:
        for flat, params in zip(self.optimizer.fp32_groups_flat, self.optimizer.fp16_groups, strict=True):
            for values, param in zip(flat.data.split([p.numel() for p in params]), params, strict=True):
                param.data.copy_(values.view_as(param))

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        group, index = self._positions[span.group]
        flat = self.optimizer.fp32_groups_flat[group]
        start = sum(p.numel() for p in self.optimizer.fp16_groups[group][:index])
        part = slice(start, start + span.length)
        state = self.optimizer.optimizer.state[flat]
        return flat.data.view(-1)[part], {k: v.view(-1)[part] if _is_flat(v, flat) else v for k, v in state.items()}


class UnfusedHalfAdapter(_HalfAdapter):
    """ZeRO-0 through `FP16_UnfusedOptimizer`: one fp32 copy per parameter."""

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return type(engine.optimizer) is FP16_UnfusedOptimizer

    def masters(self) -> list[Tensor]:
        return [copy for group in self.optimizer.fp32_groups for copy in group]

    def publish_masters(self) -> None:
        for copies, params in zip(self.optimizer.fp32_groups, self.optimizer.fp16_groups, strict=True):
            for copy, param in zip(copies, params, strict=True):
                param.data.copy_(copy.data)

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        group, index = self._positions[span.group]
        copy = self.optimizer.fp32_groups[group][index]
        return copy, self.optimizer.optimizer.state[copy]


def _is_flat(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() == flat.numel() and value.dim() > 0
