"""Gradients kept on the rank over several backwards and reduced once (ZeRO 1, 2 and 3).

DeepSpeed 0.19.8: inside `engine.coalesce_grad_reduction()` a backward leaves its gradient where autograd puts it
(`param.grad`, or `param.grad_accum` where 16-bit weights accumulate in fp32 under ZeRO-1); leaving the block reduces
what is there, parameter by parameter, into the shards that the engine's step reads.
"""

from __future__ import annotations

import contextlib
from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.nn import Parameter

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.engines.base import GradientShards
from allinone_ds.zero.params import whole_shape
from allinone_ds.zero.releases import COALESCES, RELEASE


class LocalGradients:
    """This rank's own gradients of one engine, not yet averaged over ranks.

    Args:
        engine: a DeepSpeedEngine of ZeRO stage 1, 2 or 3.
        shards: the same engine's shards, where `reduce` leaves the average.

    Raises:
        UnsupportedEngine: another kind of engine.
    """

    def __init__(self, engine: Any, shards: GradientShards):
        if type(engine.optimizer) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
            raise UnsupportedEngine(
                f"the engine's optimizer is {type(engine.optimizer).__name__} (ZeRO stage "
                f"{int(engine.zero_optimization_stage())}): it cannot keep gradients on the rank over a step; use "
                "norm='exact', or ZeRO 1, 2 or 3 (ZeRO-1 in bf16 without fp32 accumulation)"
            )
        if not COALESCES:
            raise UnsupportedEngine(
                f"DeepSpeed {RELEASE} cannot keep gradients on the rank over a step; use norm='exact', or 0.19.1 on"
            )
        self.engine = engine
        self.optimizer = engine.optimizer
        self.shards = shards
        self.params: list[Parameter] = [p for p in engine.module.parameters() if p.requires_grad]
        self.sizes = [whole_shape(p).numel() for p in self.params]  # elements, partitioned or not
        self.dtype = self.optimizer.gradient_accumulation_dtype
        self._open: contextlib.ExitStack | None = None

    @property
    def bytes(self) -> int:
        """Bytes of one whole gradient on the rank, beyond what the engine keeps in any case: ZeRO-1 keeps one."""
        if int(self.engine.zero_optimization_stage()) == 1:
            return 0
        return sum(size * param.dtype.itemsize for size, param in zip(self.sizes, self.params, strict=True))

    def begin(self) -> None:
        """From now on backwards leave their gradients on the rank."""
        if self._open is None:
            self.shards.begin_task()
            self._open = contextlib.ExitStack()
            self._open.enter_context(self.engine.coalesce_grad_reduction())

    def get(self, index: int) -> Tensor | None:
        """This rank's gradient of `params[index]`, of the parameter's whole shape; None when there is none."""
        return getattr(self.params[index], self._attribute)

    def set(self, index: int, gradient: Tensor | None) -> None:
        """Replace this rank's gradient of `params[index]`."""
        param: Any = self.params[index]
        if gradient is None or self._attribute == "grad_accum":
            setattr(param, self._attribute, gradient)
            return
        # autograd compares shapes, and a parameter that ZeRO-3 has put away is empty
        gradient = gradient.to(param.dtype)
        empty, param.data = param.data, gradient.detach()
        param.grad = gradient
        param.data = empty

    def reduce(self) -> None:
        """Average the gradients over all ranks into the engine's shards, as for its next step. Collective."""
        if self._open is not None:
            stack, self._open = self._open, None
            self.shards.begin_task()
            stack.close()

    def discard(self) -> None:
        """Forget every gradient on this rank, and what a broken backward left; no collective."""
        for index in range(len(self.params)):
            self.set(index, None)
        self.reduce()  # nothing to send
        self.shards.discard()

    @property
    def _attribute(self) -> str:
        return "grad_accum" if getattr(self.optimizer, "use_grad_accum_attribute", False) else "grad"
