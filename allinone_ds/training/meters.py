"""Running means of what a balanced step reports; nothing waits for the device until a log is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Means:
    """Means over the steps since the last log, kept as sums on the device; non-finite values are left out.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: list[str] = []
        self._sums: Tensor | None = None  # (2, names): sums, counts

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one step's values: names to scalars. The names are the same in every step."""
        row = torch.stack(
            [torch.as_tensor(v, device=self.device).detach().reshape(()).double() for v in values.values()]
        )
        finite = torch.isfinite(row)
        step = torch.stack([torch.where(finite, row, 0.0), finite.double()])
        if self._sums is None:
            self._names, self._sums = list(values), step
        elif self._names != list(values):
            raise ValueError(f"this step reports {list(values)}, the steps before it {self._names}")
        else:
            self._sums += step

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last log, of this rank."""
        return {"names": list(self._names), "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums that `state_dict` gave."""
        self._names = list(state["names"])
        self._sums = None if state["sums"] is None else state["sums"].to(self.device)

    def drain(self) -> dict[str, float]:
        """Means by name, over steps and over all ranks; then start anew. Every rank must call it.

        A name that had no finite value is NaN.
        """
        if self._sums is None:
            return {}
        table, self._sums = self._sums, None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(table)
        sums, counts = table.tolist()
        return {n: s / c if c else float("nan") for n, s, c in zip(self._names, sums, counts, strict=True)}
