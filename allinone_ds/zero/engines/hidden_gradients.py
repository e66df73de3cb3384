"""Optimizer steps that leave some of the optimizer's parameters alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def without_gradients(optimizer: torch.optim.Optimizer, still: AbstractSet[int]) -> Iterator[None]:
    """Hide the gradients of some parameters from the steps of an optimizer inside this block.

    An optimizer skips a parameter without a gradient: no momentum, no weight decay, no step counted.

    Args:
        optimizer: of torch or DeepSpeed.
        still: `id` of each of the parameters.
    """
    hidden: list[tuple[Tensor, Tensor]] = []

    def hide(optimizer: Any, args: Any, kwargs: Any) -> None:
        for param in (param for group in optimizer.param_groups for param in group["params"] if id(param) in still):
            if param.grad is not None:
                hidden.append((param, param.grad))
                param.grad = None

    def show(optimizer: Any, args: Any, kwargs: Any) -> None:
        while hidden:
            param, gradient = hidden.pop()
            param.grad = gradient

    hooks = [optimizer.register_step_pre_hook(hide), optimizer.register_step_post_hook(show)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
