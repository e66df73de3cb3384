"""Steps in which a task's loss or gradient is not finite: counted by task, and the end of the run when they go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from allinone_ds.balance.balancer import TaskBalancer
from allinone_ds.balance.report import StepReport
from allinone_ds.errors import NonFinite, RunError

_ADVICE = (
    "No weight was changed by it. Look at its data and loss, lower learning_rate, or use bf16 instead of fp16; then go "
    "on from the last checkpoint with --resume"
)


class Streaks:
    """How many steps in a row each task was not finite.

    Args:
        tasks: their names.
        limit: so many in a row end the run (`nonfinite_limit`).
    """

    def __init__(self, tasks: Sequence[str], limit: int) -> None:
        self.limit = limit
        self._steps = dict.fromkeys(tasks, 0)

    def step(self, balancer: TaskBalancer, number: int) -> StepReport:
        """The balancer's step.

        Args:
            balancer: every task has run.
            number: of the step.

        Raises:
            RunError: a task was not finite, and `nonfinite` is "stop"; or it was so too often.
        """
        try:
            report = balancer.step()
        except NonFinite as error:
            tasks = ", ".join(f"'{task}'" for task in error.tasks)
            raise RunError(
                f"step {number}: loss or gradient of task {tasks} is not finite (trainer.nonfinite is 'stop'). "
                + _ADVICE,
                on_all_ranks=True,
            ) from error
        for task in self._steps:
            self._steps[task] = self._steps[task] + 1 if task in report.skipped else 0
        worst = max(self._steps, key=lambda task: self._steps[task])
        if self._steps[worst] >= self.limit:
            raise RunError(
                f"loss or gradient of task '{worst}' was not finite in {self._steps[worst]} steps in a row, the "
                f"last of them step {number} (trainer.nonfinite_limit). {_ADVICE}",
                on_all_ranks=True,
            )
        return report

    def state_dict(self) -> dict[str, int]:
        """Steps in a row by task."""
        return dict(self._steps)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with what `state_dict` gave."""
        self._steps.update({task: count for task, count in state.items() if task in self._steps})
