"""Which values of a metric are better, and the score over tasks that decides which model is best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks import Task


def score(main: Sequence[float]) -> float:
    """Return the mean of the tasks' contributions; a task without a value (NaN, or torchmetrics' -1) counts 0.

    Example:
        >>> score([0.5, -1.0, math.nan, 0.5])
        0.25
    """
    return sum(0.0 if math.isnan(value) or value == -1 else value for value in main) / len(main)


def contribution(value: float, greater_is_better: bool) -> float:
    """Return what a main metric adds to the score: itself, or of an error e the value 1 / (1 + e), which grows as e
    falls and is 1 for no error. NaN stays NaN.

    Example:
        >>> contribution(0.75, True), contribution(3.0, False), contribution(0.0, False)
        (0.75, 0.25, 1.0)
    """
    if greater_is_better:
        return value
    return 1 / (1 + value) if not value < 0 else 1 - value  # also falls with errors below 0, such as likelihoods


def main_value(name: str, task: Task, values: Mapping[str, float]) -> float:
    """Return the contribution of a task's main metric to the score.

    Args:
        name: name of the task in the run.
        task: the task.
        values: what its metric computed.

    Raises:
        ConfigError: the metric did not compute the main metric.
    """
    if task.main_metric not in values:
        raise ConfigError(
            f"tasks.{name}: {type(task).__name__}.metric() computed {', '.join(sorted(values)) or 'nothing'}, but not "
            f"the main metric '{task.main_metric}'; correct main_metric of the class, or compute it"
        )
    return contribution(values[task.main_metric], task.better_is_greater(task.main_metric) is not False)


def selects_greater(metric: str, tasks: Mapping[str, Task], evaluated: Collection[str], given: bool | None) -> bool:
    """Return whether the best checkpoint is the one with the largest value of a metric.

    Args:
        metric: `metric_for_best_model`: "score", or TASK_METRIC, with or without "eval_".
        tasks: tasks of the model by name.
        evaluated: names of the tasks with evaluation data.
        given: `greater_is_better`, where the user set it.

    Raises:
        ConfigError: there is no such metric, its direction is unknown, or the user's differs from the declared one.

    Example:
        >>> selects_greater("score", {}, (), None)
        True
    """
    name = metric.removeprefix("eval_")
    declared: bool | None = True
    if name != "score":
        owner = max((task for task in tasks if name.startswith(f"{task}_")), key=len, default=None)
        if owner is None:
            known = ["score", *(f"{task}_{key}" for task in tasks for key in tasks[task].known_metrics())]
            raise ConfigError(f"trainer.metric_for_best_model: no metric '{name}'; {did_you_mean(name, known)}")
        key = name.removeprefix(f"{owner}_")
        declared = tasks[owner].better_is_greater(key)
        if declared is None and given is None:
            raise ConfigError(
                f"trainer.metric_for_best_model = '{metric}': it is not known whether larger or smaller values are "
                f"better; metrics of '{owner}' with a known direction: {', '.join(tasks[owner].known_metrics())}. "
                f"Choose one of them, set trainer.greater_is_better, or declare it: {type(tasks[owner]).__name__}."
                f"greater_is_better = {{'{key}': ...}}"
            )
        if evaluated and owner not in evaluated:
            raise ConfigError(
                f"trainer.metric_for_best_model = '{metric}': the task '{owner}' has no evaluation data; set "
                f"tasks.{owner}.test, or choose a metric of {', '.join(sorted(evaluated))}"
            )
    if given is not None and declared is not None and given != declared:
        better = "larger" if declared else "smaller"
        raise ConfigError(
            f"trainer.greater_is_better = {given}: of '{name}' {better} values are better, so the worst model would be "
            "kept; remove greater_is_better"
        )
    return bool(declared if declared is not None else given)


def settle_direction(args: Any, tasks: Mapping[str, Task], evaluated: Collection[str]) -> None:
    """Set `greater_is_better` of training arguments, which the best checkpoint and early stopping read, and with it the
    direction of a schedule that waits for a plateau.

    Args:
        args: an `AllInOneArguments`.
        tasks: tasks of the model by name.
        evaluated: names of the tasks with evaluation data.

    Raises:
        ConfigError: see `selects_greater`.
    """
    if args.metric_for_best_model is None:
        return
    args.greater_is_better = selects_greater(args.metric_for_best_model, tasks, evaluated, args.chosen_direction)
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # both expect a metric that falls
        mode = "max" if args.greater_is_better else "min"
        given = args.lr_scheduler_kwargs or {}
        if given.get("mode", mode) != mode:
            raise ConfigError(
                f"trainer.lr_scheduler_kwargs.mode = '{given['mode']}': of '{args.metric_for_best_model}' "
                f"{'larger' if mode == 'max' else 'smaller'} values are better, so the rate would fall while the model "
                "improves; remove mode"
            )
        args.lr_scheduler_kwargs = {"mode": mode, **given}
