"""How many labels a task has in the micro-steps of all ranks, so that its gradient is the mean over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from allinone_ds.balance.agreement import Agreement
from allinone_ds.distributed import gather_objects, world_size
from allinone_ds.errors import BalancerError


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

    Example:
        >>> labels = LabelCounts(tasks=1, micro_steps=2)
        >>> labels.weights([3]), labels.weights([1]), labels.units()
        ([0.5], [0.16666666666666666], [1.5])
    """

    def __init__(self, tasks: int, micro_steps: int, agreement: Agreement | None = None):
        self.totals = [0] * tasks
        self.rows: list[list[int]] = []
        self._micro_steps, self._agreement = micro_steps, agreement
        self._references = [0] * tasks

    def weights(self, counts: Sequence[int]) -> list[float]:
        """Return what this rank's losses of a micro-step are multiplied by. Collective.

        Args:
            counts: number of labels of each task on this rank.

        Raises:
            BalancerError: a count that is not an integer of 0 or more.
        """
        own = [_integer(count) for count in counts]
        self.rows = self._agreement.rows(own) if self._agreement else gather_objects(own)
        for index, of_ranks in enumerate(zip(*self.rows, strict=True)):
            self.totals[index] += sum(of_ranks)
            self._references[index] = self._references[index] or max(of_ranks) * self._micro_steps
        return [n / ref if ref else 0.0 for n, ref in zip(own, self._references, strict=True)]

    def units(self) -> list[float]:
        """Return, per task, what its gradient and loss are multiplied by after the last micro-step."""
        pairs = zip(self._references, self.totals, strict=True)
        return [world_size() * reference / total if total else 0.0 for reference, total in pairs]


def _integer(count: object) -> int:
    number = int(count)  # type: ignore[call-overload]
    if number != count or number < 0:
        raise BalancerError(f"count = {count!r}; allowed: the number of labels, an integer of 0 or more")
    return number
