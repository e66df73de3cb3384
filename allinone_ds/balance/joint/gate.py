"""The autograd functions between backbone and heads: they pass features on and hold the tasks' gradients back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Sums = Sequence[Tensor | None]
Combine = Callable[[Sequence[str], Mapping[str, Sequence[Tensor | None]], Sums], Sums]


class Gate:
    """Between the backbone and the heads that read the same tensors.

    Args:
        tensors: what the heads read.
        combine: from tasks, task -> the gradient of each tensor, and the sum of each tensor so far, to its sum with the
            scaled gradients of these tasks.
        most: gradients of so many tasks are combined before those of others come back; None: all together.

    Attributes:
        tasks: those whose heads read the tensors.
        outputs: the tensors, for the marks of the tasks.
        reached: tasks whose gradients came back.
    """

    def __init__(self, tensors: tuple[Tensor, ...], combine: Combine, most: int | None = None):
        self.tensors = tensors
        self.tasks: list[str] = []
        self.reached: set[str] = set()
        self.outputs: tuple[Tensor, ...] = _Combine.apply(self, *tensors)
        self._combine, self._most = combine, most
        self._waiting: dict[str, tuple[Tensor | None, ...]] = {}
        self._sums: Sums = [None] * len(tensors)
        self._combined: set[str] = set()

    def mark(self, task: str) -> tuple[Tensor, ...]:
        """Return the tensors for the head of a task."""
        self.tasks.append(task)
        return _Mark.apply(self, task, *self.outputs)

    def receive(self, task: str, gradients: tuple[Tensor | None, ...]) -> None:
        """Keep the gradients of a task until they are combined."""
        self.reached.add(task)
        self._waiting[task] = gradients
        if len(self._waiting) == self._most:
            self._add(tuple(self._waiting))

    def combine(self) -> list[Tensor]:
        """Return the scaled sum of each tensor; zeros reach the backbone too, since all ranks take part in it."""
        left = [task for task in self.tasks if task not in self._combined]
        if left:
            self._add(left)
        sums, self._sums = self._sums, ()  # not kept during the backward of the backbone
        return [torch.zeros_like(t) if s is None else s.to(t.dtype) for s, t in zip(sums, self.tensors, strict=True)]

    def _add(self, tasks: Sequence[str]) -> None:
        self._sums = self._combine(tasks, self._waiting, self._sums)
        self._combined.update(tasks)
        self._waiting = {}


def reached_from(loss: Tensor) -> tuple[set[str], set[int]]:
    """Return the tasks whose marks a loss reaches, and the `id` of each leaf that it reaches without passing a mark."""
    nodes = _nodes(loss, beyond_marks=False)
    marks = {node.task for node in nodes if _is_mark(node)}
    return marks, {id(node.variable) for node in nodes if hasattr(node, "variable")}


def apart_from_others(losses: Mapping[str, Tensor]) -> str | None:
    """Return a task whose loss has no operation in common with the losses of the other tasks; None: there is none."""
    graphs = {task: {n for n in _nodes(loss) if not hasattr(n, "variable")} for task, loss in losses.items()}
    for task, nodes in graphs.items():
        others = [other for name, other in graphs.items() if name != task]
        if others and not any(nodes & other for other in others):
            return task
    return None


def _nodes(loss: Tensor, beyond_marks: bool = True) -> set[Any]:
    """Return the nodes of a loss's graph."""
    seen: set[Any] = set()
    left = [loss.grad_fn]
    while left:
        node: Any = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if beyond_marks or not _is_mark(node):
                left += [following for following, _ in node.next_functions]
    return seen


def _is_mark(node: Any) -> bool:
    return isinstance(node, _Mark._backward_cls)  # type: ignore[attr-defined]


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
        ctx.gate.receive(ctx.task, gradients)
        return (None,) * (2 + len(gradients))
