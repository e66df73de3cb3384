"""The schedule of a run in which the heads of some tasks follow schedules of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.head_schedule import HeadSchedule


def groups_of_optimizer(optimizer: Any, learning_rate: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, which may be DeepSpeed's; give it the `defaults` that schedules read.

    Args:
        optimizer: of torch or DeepSpeed.
        learning_rate: of the run.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(inner, "defaults"):  # DeepSpeed's has none, and `polynomial` reads it
        inner.defaults = {"lr": learning_rate}
    return inner.param_groups


def with_head_schedules(
    scheduler: Any, groups: Sequence[dict[str, Any]], rates: Sequence[float], args: Any, steps: int
) -> Any:
    """Return the schedule of a run, in which the heads of some tasks follow schedules of their own.

    Args:
        scheduler: of all groups, as `lr_scheduler_type` names it.
        groups: those of the optimizer, with their names.
        rates: of the groups before any schedule.
        args: arguments of the run; `head_schedule` has the tasks' own schedules.
        steps: length of the run.

    Raises:
        ConfigError: the schedule of the run follows a metric, not the step.
    """
    vars(scheduler).setdefault("base_lrs", list(rates))  # schedules that wait for a plateau keep only the current rates
    own = {task: HeadSchedule.model_validate(given) for task, given in (args.head_schedule or {}).items()}
    if own and not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"tasks.{min(own)}.schedule: trainer.lr_scheduler_type = '{getattr(args.lr_scheduler_type, 'value', '')}' "
            "follows a metric, so that no head can follow the step; choose a type such as cosine, or remove the "
            "schedule"
        )
    for number, group in enumerate(groups):
        kind, _, rest = group["name"].partition("/")
        task = rest.partition("/")[0].split("+")[0]  # of several heads with the same settings
        if kind == "head" and task in own:
            scheduler.lr_lambdas[number] = own[task].factor(steps)
            group["lr"] = scheduler._last_lr[number] = scheduler.base_lrs[number] * scheduler.lr_lambdas[number](0)
    return scheduler


def head_rates(groups: Sequence[dict[str, Any]], args: Any) -> dict[str, float]:
    """Return {"learning_rate/TASK": rate of its head} of the tasks with a schedule of their own."""
    rates = {"/".join(group["name"].split("/")[:2]): group["lr"] for group in groups}
    return {f"learning_rate/{task}": rates[f"head/{task}"] for task in args.head_schedule or {}}
