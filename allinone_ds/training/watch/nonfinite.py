"""Count the consecutive steps in which a task is not finite, and end the run if there are too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from allinone_ds.balance.balancer import TaskBalancer
from allinone_ds.balance.report import StepReport
from allinone_ds.errors import NonFinite, RunError

_ADVICE = (
    "It changed no weight. Check the data and loss of the task, lower learning_rate, or use bf16 instead of fp16; then "
    "resume from the last checkpoint with --resume"
)


class NonFiniteStreaks:
    """Counts, per task, the consecutive steps in which its loss, gradient or factor was not finite.

    Args:
        tasks: names of the tasks.
        limit: number of consecutive steps that ends the run (`nonfinite_limit`).
        sampled: whether steps run some of the tasks only. A step without a task does not count for it.
    """

    def __init__(self, tasks: Sequence[str], limit: int, sampled: bool = False) -> None:
        self.limit = limit
        self.sampled = sampled
        self._steps = dict.fromkeys(tasks, 0)

    def step(self, balancer: TaskBalancer, number: int) -> StepReport:
        """Run `balancer.step()` and count the tasks that it skipped.

        Args:
            balancer: a balancer whose tasks of the step have all run their micro-steps.
            number: index of the optimizer step.

        Returns:
            The report of the step.

        Raises:
            RunError: a task was not finite and `nonfinite` is "stop", or it reached the limit.
        """
        try:
            report = balancer.step(require_all=not self.sampled)
        except NonFinite as error:
            tasks = ", ".join(f"'{task}'" for task in error.tasks)
            raise RunError(
                f"step {number}: loss, gradient or factor of task {tasks} is not finite (trainer.nonfinite is 'stop'). "
                + _ADVICE,
                on_all_ranks=True,
            ) from error
        for task in report.tasks:
            self._steps[task] = self._steps[task] + 1 if task in report.skipped else 0
        worst = max(self._steps, key=lambda task: self._steps[task])
        if self._steps[worst] >= self.limit:
            raise RunError(
                f"loss, gradient or factor of task '{worst}' was not finite in {self._steps[worst]} steps in a row, "
                f"the last of them step {number} (trainer.nonfinite_limit). {_ADVICE}",
                on_all_ranks=True,
            )
        return report

    def state_dict(self) -> dict[str, int]:
        """Return {task: number of consecutive steps}."""
        return dict(self._steps)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the result of `state_dict`; tasks that no longer exist are ignored."""
        self._steps.update({task: count for task, count in state.items() if task in self._steps})
