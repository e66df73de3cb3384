"""The autograd functions between backbone and heads: they pass features on and hold the tasks' gradients back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Combine = Callable[[Sequence[str], Mapping[str, Sequence[Tensor | None]]], list[Tensor | None]]


class Gate:
    """Between the backbone and the heads that read the same tensors.

    Args:
        tensors: what the heads read.
        combine: from the tasks, and task -> the gradient of each tensor, to the scaled sum of each tensor.

    Attributes:
        tasks: those whose heads read the tensors.
        outputs: the tensors, for the marks of the tasks.
        reached: task -> the gradients that came back.
    """

    def __init__(self, tensors: tuple[Tensor, ...], combine: Combine):
        self.tensors = tensors
        self.tasks: list[str] = []
        self.reached: dict[str, tuple[Tensor | None, ...]] = {}
        self.outputs: tuple[Tensor, ...] = _Combine.apply(self, *tensors)
        self._combine = combine

    def mark(self, task: str) -> tuple[Tensor, ...]:
        """Return the tensors for the head of a task."""
        self.tasks.append(task)
        return _Mark.apply(self, task, *self.outputs)

    def combine(self) -> list[Tensor]:
        """Return the scaled sum of each tensor; zeros reach the backbone too, since all ranks take part in it."""
        sums = self._combine(self.tasks, self.reached) or [None] * len(self.tensors)
        return [torch.zeros_like(t) if s is None else s for s, t in zip(sums, self.tensors, strict=True)]


class _Combine(Function):
    """Identity; the backward of all marks comes before it."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.set_materialize_grads(False)  # the marks give nothing to it
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gate.combine())


class _Mark(Function):
    """Identity; its backward hands the gradient of one task to the gate, and nothing to autograd."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, task: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gate, ctx.task = gate, task
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.gate.reached[ctx.task] = gradients
        return (None,) * (2 + len(gradients))
