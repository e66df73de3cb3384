"""What a combiner knows about a step before and after it has added the tasks' gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from allinone_ds.balance.report import StepReport


@dataclass(frozen=True)
class Combined:
    """What became of each task in a step; fields as in `StepReport`.

    Args:
        usable: False when there is nothing that the optimizer should step on.
    """

    tasks: tuple[str, ...]
    norms: dict[str, Tensor]
    scales: dict[str, Tensor]
    losses: dict[str, Tensor]
    whole_norms: dict[str, Tensor]
    skipped: tuple[str, ...]
    overflow: bool
    usable: bool
    norm_error: float = 0.0
    gram: Tensor | None = None

    def report(self, overflow: bool, applied: bool, watched: bool) -> StepReport:
        """Return the report of the step.

        Args:
            overflow: whether fp16 gradients overflowed, before or in the engine's step.
            applied: whether the optimizer changed the weights.
            watched: whether the report gets the Gram matrix.
        """
        return StepReport(
            norms=self.norms,
            scales=self.scales,
            losses=self.losses,
            whole_norms=self.whole_norms,
            skipped=self.skipped,
            overflow=overflow,
            applied=applied,
            tasks=self.tasks,
            gram=self.gram if watched else None,
            norm_error=self.norm_error,
        )


@dataclass(frozen=True)
class Verdict:
    """What must be known on the CPU before a step is taken.

    Args:
        skipped: tasks to leave out, because their loss or gradient is not finite.
        overflow: whether an fp16 gradient overflowed.
        factors: task -> factor on the device of the computations; a factor that is not finite is absent.
        on_cpu: the same on the CPU.
    """

    skipped: tuple[str, ...]
    overflow: bool
    factors: dict[str, Tensor]
    on_cpu: dict[str, Tensor]
