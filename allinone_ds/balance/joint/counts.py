"""How many labels a task has in the micro-steps of all ranks, so that its gradient is the mean over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from allinone_ds.balance.agreement import Agreement
from allinone_ds.distributed import gather_objects, world_size
from allinone_ds.errors import BalancerError
from allinone_ds.strict import did_you_mean


class LabelCounts:
    """Counts the labels of T tasks in one block. Construct it on every rank.

    Rank r's loss l_kr of micro-step k is the mean over its n_kr labels. The mean over all labels is
    sum_kr n_kr l_kr / N with N = sum_kr n_kr, which is known after the last micro-step only. Losses are therefore
    weighted by n_kr / n, where n is K times the largest count of the first micro-step that has labels. The mean over
    ranks of the gradients, times R n / N, is then the gradient of the mean.

    Args:
        tasks: T.
        micro_steps: K.
        agreement: exchanges the counts; None: they are gathered without it.

    Attributes:
        totals: N of each task so far, over all ranks.
        rows: counts of the last micro-step, R lists of T.
        flags: what each rank passed beside them, R lists.

    Example:
        >>> labels = LabelCounts(tasks=1, micro_steps=2)
        >>> labels.weights([3]), labels.weights([1]), labels.units()
        ([0.5], [0.16666666666666666], [1.5])
    """

    def __init__(self, tasks: int, micro_steps: int, agreement: Agreement | None = None):
        self.totals = [0] * tasks
        self.rows: list[list[int]] = []
        self.flags: list[list[int]] = []
        self._micro_steps, self._agreement = micro_steps, agreement
        self._references = [0] * tasks

    def weights(self, counts: Sequence[int], flags: Sequence[int] = ()) -> list[float]:
        """Return what this rank's losses of a micro-step are multiplied by. Collective.

        Args:
            counts: number of labels of each task on this rank.
            flags: further integers that the ranks exchange in the same message.

        Raises:
            BalancerError: a count that is not an integer of 0 or more.
        """
        own = [_integer(count) for count in counts]
        message = [*own, *flags]
        rows = self._agreement.rows(message) if self._agreement else gather_objects(message)
        self.rows, self.flags = [row[: len(own)] for row in rows], [row[len(own) :] for row in rows]
        for index, of_ranks in enumerate(zip(*self.rows, strict=True)):
            self.totals[index] += sum(of_ranks)
            self._references[index] = self._references[index] or max(of_ranks) * self._micro_steps
        return [n / ref if ref else 0.0 for n, ref in zip(own, self._references, strict=True)]

    def units(self) -> list[float]:
        """Return, per task, what its gradient and loss are multiplied by after the last micro-step."""
        pairs = zip(self._references, self.totals, strict=True)
        return [world_size() * reference / total if total else 0.0 for reference, total in pairs]


def check_counts(tasks: Sequence[str], losses: Mapping[str, Any], counts: Any) -> None:
    """Raise unless there is a count for each loss of several tasks.

    Args:
        tasks: names of the T tasks.
        losses: task -> loss, or None.
        counts: task -> number of labels; None: labels are not counted.

    Raises:
        BalancerError: no mapping, an unknown task, a loss without a count, a count below 0, or one above 0 without a
            loss, whose labels would be counted and not trained on.
    """
    if counts is None:
        return
    if not isinstance(counts, Mapping):
        raise BalancerError(f"count = {counts!r} beside losses of several tasks; pass a dict: task -> number of labels")
    for task in counts:
        if task not in tasks:
            raise BalancerError(f"a count of the unknown task '{task}'; {did_you_mean(str(task), tasks)}")
    for task in tasks:
        if losses[task] is not None and task not in counts:
            raise BalancerError(f"no count of task '{task}', which has a loss; pass the number of its labels")
        number = counts.get(task, 0)
        if isinstance(number, Tensor):
            continue
        if not isinstance(number, Real) or not 0 <= float(number) < math.inf:  # also integers of numpy
            raise BalancerError(f"count of task '{task}' = {number!r}; allowed: the number of labels, 0 or more")
        if number and losses[task] is None:
            raise BalancerError(
                f"count of task '{task}' = {number!r}, and its loss is None; pass a count of 0, or the loss"
            )


def _integer(count: Any) -> int:
    try:
        number = int(count)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or number != count:
        raise BalancerError(f"count = {count!r}; allowed: the number of labels, an integer of 0 or more")
    return number
