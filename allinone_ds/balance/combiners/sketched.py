"""Combiners that keep gradients on the rank over the step and reduce once; their norms come from sketches.

The gradients of each rank stay whole on that rank until the step, for any ZeRO stage. So these modes trade memory for
traffic: one sketch per task (or per step) and one reduce per step, where exact norms need one reduce per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.arithmetic import add_scaled
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.outcome import Combined
from allinone_ds.balance.combiners.sketch import Sketcher, default_size, held_bytes, norm_error
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.distributed import all_reduce
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.local_gradients import LocalGradients

_SMALL = 1 << 14
"""Elements of a parameter up to which it is sketched together with others."""


class LocalCombiner(Combiner):
    """Base of the combiners with local gradients: their sketches, and the one reduce of a step.

    Args:
        adapter: of the engine.
        weighting: turns the record of the step into factors.
        size: length k of a sketch; None chooses by the number of parameters.
        order: names of all tasks.

    Attributes:
        local: this rank's gradients.
        shared: whether each parameter of `local` belongs to the backbone.
    """

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, size: int | None, order: tuple[str, ...]):
        super().__init__(adapter, weighting, order)
        self.local = LocalGradients(adapter)
        sizes = self.local.sizes
        self.shared = [id(p) in adapter.shared for p in self.local.params]
        self._small = {
            shared: [i for i, size in enumerate(sizes) if size <= _SMALL and self.shared[i] == shared]
            for shared in (True, False)
        }
        together = [sum(sizes[index] for index in small) for small in self._small.values()]
        self.sketcher = Sketcher([*sizes, *together], size or default_size(sum(sizes)), adapter.compute_device)
        self._flats: list[Tensor] = []
        self._steps = 0

    @property
    def reduces_in_order(self) -> bool:
        return False  # parameter by parameter, in their own order

    @property
    def norm_error(self) -> float:
        """Bound of the relative standard error of the norms."""
        return norm_error(self.sketcher.size)

    def begin(self, task: str) -> None:
        self.local.begin()

    def before_backward(self) -> None:
        pass  # gradients stay on the rank, and `LocalGradients.begin` has checked

    def reduces(self, last: bool) -> bool:
        return False

    def communicates(self, last: bool) -> bool:
        return self.adapter.stage == 3  # which gathers weights

    def reset(self) -> None:
        self.local.discard()

    def _kept_bytes(self, backbones: int) -> int:
        """Return the bytes of one whole gradient, and of further ones of the backbone."""
        shared = sum(size for size, is_shared in zip(self.local.sizes, self.shared, strict=True) if is_shared)
        return self.local.bytes + backbones * shared * self.local.dtype.itemsize

    def _sketch(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Return the sketches of gradients, by the index of the parameter, (2, k): of the backbone and of the heads.

        Small parameters are sketched as one: a ViT-L has 300 of them.
        """
        turns = self.sketcher.empty(2)
        small: set[int] = set()
        for number, (row, indices) in enumerate(zip(turns, self._small.values(), strict=True)):
            present = [index for index in indices if index in gradients]
            if not present:
                continue
            flat = torch.zeros(sum(self.local.sizes[index] for index in indices), device=turns.device)
            places = dict(zip(indices, flat.split([self.local.sizes[index] for index in indices]), strict=True))
            values = [gradients[index].detach() for index in present]
            torch._foreach_copy_([places[i].view(v.shape) for i, v in zip(present, values, strict=True)], values)
            self.sketcher.add(row, len(self.local.sizes) + number, flat)
            small.update(present)
        for index, gradient in gradients.items():
            if index not in small:
                self.sketcher.add(turns[0 if self.shared[index] else 1], index, gradient)
        return self.sketcher.sketch(turns)

    def _scales(self, index: int) -> bool:
        """Return whether the gradient of a parameter gets the factor of its task."""
        return self.shared[index] or self.weighting.heads == "same"

    def _add_scaled(
        self,
        sums: dict[int, Tensor],
        gradients: Mapping[int, Tensor],
        factor: Tensor,
        usable: Tensor,
        part: float = 1.0,
    ) -> None:
        """Add a task's scaled gradient to `sums`, both by the index of the parameter.

        Args:
            sums: changed in place.
            gradients: of the task; they may be changed.
            factor: of the task, 0-dim.
            usable: False adds zeros, 0-dim bool.
            part: further factor, also of gradients that do not get that of their task.
        """
        for scales, own in ((True, factor * part), (False, torch.full_like(factor, part))):
            alike = [index for index in gradients if self._scales(index) == scales]
            for index in alike:
                if index not in sums:
                    sums[index] = torch.zeros_like(gradients[index], dtype=self.local.dtype)
            add_scaled([sums[index] for index in alike], [gradients[index] for index in alike], own, usable)

    def _reduced(self, skipped: tuple[str, ...], overflow: bool, usable: bool) -> Combined:
        """Reduce the local gradients, once, and take the result as the step's sum."""
        self._flats = self._flats or self._new_flats()
        if usable:
            self.local.reduce()
            for piece, gradient in zip(self.adapter.pieces, self.adapter.gradient(), strict=True):
                self._flats[piece.group].narrow(0, piece.start, piece.length).copy_(gradient)
            self.adapter.clear_gradient()
        else:
            self.local.discard()
        self._steps += 1  # not in `clear`, which a single rank may call in `abandon`: all ranks draw the same signs
        self.sketcher.renew(self._steps)
        return self._combined(self._flats, skipped, overflow, usable, self.norm_error)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:  # empty when it comes from exact norms
            self._steps = state["steps"]
            self.sketcher.renew(self._steps)

    def close(self) -> None:
        self.local.discard()
        self.clear()


class SketchCombiner(LocalCombiner):
    """Norms of this step, estimated from sketches before the reduce; one reduce per step.

    Beside its gradients each rank keeps the sum of the tasks scaled so far, of the same size. Only for weightings that
    stream: the others would need T whole gradients on every rank.
    """

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, size: int | None, order: tuple[str, ...]):
        super().__init__(adapter, weighting, size, order)
        self._sums: dict[int, Tensor] = {}  # index of the parameter -> the scaled sum so far
        self._sketches: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        return super().bytes + self._kept_bytes(1) + held_bytes(self.sketcher.size)

    def add(self, task: str, loss: Tensor) -> None:
        size = self.sketcher.size
        gradients = {index: g for index, g in enumerate(self.local.remove_all()) if g is not None}
        message = torch.cat([self._sketch(gradients).view(-1), loss.float().view(1)])
        all_reduce(message)
        if self.watch:
            self._sketches[task] = message[:size] / self.world
        square, other = (message[: 2 * size].view(2, size).double() / self.world).square().sum(1)
        record, usable = self._record_of(task, square, square + other, message[-1].double() / self.world)
        factor = self.weighting.factors(record)[0]
        usable = self._with_factor(record, usable, factor)
        self._add_scaled(self._sums, gradients, factor, usable)
        self.records[task], self.usable[task], self.factors[task] = record, usable, factor

    def finish(self) -> Combined:
        verdict = self._verdict()
        for index in list(self._sums):
            self.local.set(index, self._sums.pop(index))  # which may copy it: never two whole gradients
        if self._sketches:
            self._gram = self._gram_of(torch.stack([self._sketches[task] for task in self.tasks]), summed=True)
        usable = len(verdict.skipped) < len(self.tasks)
        return self._reduced(verdict.skipped, verdict.overflow, usable)

    def drop(self) -> None:
        self.local.remove_all()

    def clear(self) -> None:
        super().clear()
        self._sums, self._sketches = {}, {}
