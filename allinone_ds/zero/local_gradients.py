"""Gradients kept on the rank over several backwards and reduced once (ZeRO 1, 2 and 3).

DeepSpeed 0.19.8: inside `engine.coalesce_grad_reduction()` a backward leaves its gradient where autograd puts it
(`param.grad`, or `param.grad_accum` where 16-bit weights accumulate in fp32 under ZeRO-1); leaving the block reduces
what is there, parameter by parameter, into the shards that the engine's step reads.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.params import whole_shape
from allinone_ds.zero.releases import COALESCES, RELEASE


class LocalGradients:
    """This rank's own gradients of one engine, not yet averaged over ranks.

    Args:
        adapter: of an engine that `keeps_local_gradients`; `reduce` leaves the average in its shards.

    Raises:
        UnsupportedEngine: this release of DeepSpeed cannot keep gradients on the rank.

    Attributes:
        params: the trainable parameters; the other methods name them by their index.
        sizes: elements of each parameter, partitioned or not.
        dtype: in which gradients accumulate.
    """

    def __init__(self, adapter: EngineAdapter):
        if not COALESCES:
            raise UnsupportedEngine(
                f"DeepSpeed {RELEASE} cannot keep gradients on the rank over a step; use norm='exact', or DeepSpeed "
                "0.19.1 or newer"
            )
        self.adapter = adapter
        self.params: list[Parameter] = [p for p in adapter.engine.module.parameters() if p.requires_grad]
        self.sizes = [whole_shape(p).numel() for p in self.params]
        self.dtype = adapter.optimizer.gradient_accumulation_dtype
        self._open: contextlib.ExitStack | None = None

    @property
    def bytes(self) -> int:
        """Bytes of one whole gradient on the rank, beyond what the engine keeps in any case: ZeRO-1 keeps one."""
        if self.adapter.stage == 1:
            return 0
        return sum(size * param.dtype.itemsize for size, param in zip(self.sizes, self.params, strict=True))

    def begin(self) -> None:
        """Make the backwards from now on leave their gradients on the rank."""
        if self._open is None:
            self.adapter.refuse_no_sync()
            self.adapter.begin_task()
            self._open = contextlib.ExitStack()
            self._open.enter_context(self.adapter.engine.coalesce_grad_reduction())

    def has_post_accumulate_hook(self, index: int) -> bool:
        """Return whether the user has registered a hook of `params[index]` that runs after accumulation."""
        hooks = getattr(self.params[index], "_post_accumulate_grad_hooks", None) or {}
        return any(
            not getattr(hook, "__module__", "").startswith(("deepspeed.", "allinone_ds.")) for hook in hooks.values()
        )

    def get(self, index: int) -> Tensor | None:
        """Return this rank's gradient of `params[index]`, of the parameter's whole shape; None when there is none."""
        return getattr(self.params[index], self._attribute)

    def set(self, index: int, gradient: Tensor | None) -> None:
        """Replace this rank's gradient of `params[index]`."""
        param: Any = self.params[index]
        if gradient is None or self._attribute == "grad_accum":
            setattr(param, self._attribute, gradient)
            return
        # autograd compares shapes, and a parameter that ZeRO-3 has partitioned is empty
        gradient = gradient.to(param.dtype)
        empty, param.data = param.data, gradient.detach()
        param.grad = gradient
        param.data = empty

    def remove_all(self) -> list[Tensor | None]:
        """Remove and return every gradient of this rank, by the index of its parameter."""
        gradients = [self.get(index) for index in range(len(self.params))]
        for index in range(len(self.params)):
            self.set(index, None)
        return gradients

    def reduce(self) -> None:
        """Average the gradients over all ranks into the engine's shards, as for its next step. Collective."""
        if self._open is not None:
            stack, self._open = self._open, None
            self.adapter.begin_task()
            stack.close()

    def discard(self) -> None:
        """Forget every gradient on this rank, and what a backward that raised has left; not collective."""
        self.remove_all()
        self.reduce()  # nothing to send
        self.adapter.discard()

    @property
    def _attribute(self) -> str:
        return "grad_accum" if getattr(self.adapter.optimizer, "use_grad_accum_attribute", False) else "grad"
