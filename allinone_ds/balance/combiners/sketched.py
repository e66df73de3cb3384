"""TODO."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.arithmetic import scale_or_zero
from allinone_ds.balance.combiners.base import Combined, Combiner
from allinone_ds.balance.sketch import Sketcher, default_size, norm_error
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.errors import ConfigError
from allinone_ds.zero.engines.base import GradientShards
from allinone_ds.zero.local_gradients import LocalGradients


class LocalCombiner(Combiner):
    """What both modes share: local gradients, sketches of them, and the step's one reduce.

    Args:
        shards: the engine's gradient shards.
        weighting: what turns the record of the step into factors.
        size: length k of a sketch; None chooses by the number of parameters.
    """

    def __init__(self, shards: GradientShards, weighting: Weighting, size: int | None):
        super().__init__(shards, weighting)
        self.local = LocalGradients(shards.engine, shards)
        sizes = self.local.sizes
        self.sketcher = Sketcher(sizes, size or default_size(sum(sizes)), shards.engine.device)
        self.shared = [id(p) in shards.shared for p in self.local.params]
        self._flats: list[Tensor] = []
        self._steps = 0

    @property
    def norm_error(self) -> float:
        """Bound of the norms' relative standard error."""
        return norm_error(self.sketcher.size)

    def begin(self, task: str) -> None:
        self.local.begin()

    def reduces(self, last: bool) -> bool:
        return False

    def _kept_bytes(self, backbones: int) -> int:
        """Bytes of one whole gradient, and of further ones of the backbone."""
        shared = sum(size for size, is_shared in zip(self.local.sizes, self.shared, strict=True) if is_shared)
        return self.local.bytes + backbones * shared * self.local.dtype.itemsize

    def _scales(self, index: int) -> bool:
        """Whether a parameter's gradient gets its task's factor."""
        return self.shared[index] or self.weighting.heads == "same"

    def _reduced(self, skipped: tuple[str, ...], overflow: bool, usable: bool) -> Combined:
        """Reduce what is on the ranks, once, and take it as the step's sum."""
        self._flats = self._flats or self._new_flats()
        if usable:
            self.local.reduce()
            flats = iter(self.shards.take())
            for piece in self.shards.pieces:
                self._flats[piece.group].narrow(0, piece.start, piece.length).copy_(next(flats))
            self.shards.release()
        else:
            self.local.discard()
        return self._combined(self._flats, skipped, overflow, usable, self.norm_error)

    def clear(self) -> None:
        super().clear()
        self._steps += 1
        self.sketcher.renew(self._steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # else it comes from exact norms
            self._steps = state["steps"]
            self.sketcher.renew(self._steps)

    def close(self) -> None:
        self.local.discard()
        self.clear()


class SketchCombiner(LocalCombiner):
    """Norms of this step, estimated from sketches before the reduce; one reduce a step.

    Beside its gradients each rank keeps the sum of the tasks scaled so far, of the same size. Only for weightings that
    stream: the others would need T whole gradients on every rank.
    """

    def __init__(self, shards: GradientShards, weighting: Weighting, size: int | None):
        if not weighting.streams:
            raise ConfigError(
                f"norm='sketch' cannot serve {weighting!r}, which must see every task before it scales one: T "
                "gradients of the whole model would stay on every rank; use norm='delayed' or norm='exact'"
            )
        super().__init__(shards, weighting, size)
        self._held: dict[int, Tensor] = {}  # parameter -> the scaled sum so far
        self._sketches: list[Tensor] = []

    @property
    def bytes(self) -> int:
        return super().bytes + self._kept_bytes(1) + 2 * 4 * self.sketcher.size

    def add(self, task: str, loss: Tensor) -> None:
        size = self.sketcher.size
        message = torch.zeros(2 * size + 1, device=self.sketcher.device)  # sketches: backbone, heads; loss
        found = []
        for index, is_shared in enumerate(self.shared):
            gradient = self.local.get(index)
            if gradient is not None:
                found.append((index, gradient))
                self.sketcher.add(message[:size] if is_shared else message[size : 2 * size], index, gradient)
        message[-1] = loss
        if self.world > 1:
            dist.all_reduce(message)
        if self.watch:
            self._sketches.append(message[:size] / self.world)
        square, other = (message[: 2 * size].view(2, size).double() / self.world).square().sum(1)
        record, finite = self._record_of(task, square, square + other, message[-1].double() / self.world)
        factor = self.weighting.factors(record)[0]
        for index, gradient in found:
            self.local.set(index, None)
            mine = factor if self._scales(index) else torch.ones_like(factor)
            scaled = scale_or_zero(gradient.to(self.local.dtype), mine, finite)
            self._held[index] = self._held[index].add_(scaled) if index in self._held else scaled
        self.records[task], self.finite[task], self.factors[task] = record, finite, factor

    def finish(self) -> Combined:
        skipped, overflow = self._verdicts()
        for index, gradient in self._held.items():
            self.local.set(index, gradient)
        self._held = {}
        if self._sketches:
            self._gram = self._gram_of(torch.stack(self._sketches), summed=True)
        return self._reduced(skipped, overflow, usable=len(skipped) < len(self.tasks))

    def drop(self) -> None:
        for index in range(len(self.local.params)):
            self.local.set(index, None)

    def clear(self) -> None:
        super().clear()
        self._held, self._sketches = {}, []
