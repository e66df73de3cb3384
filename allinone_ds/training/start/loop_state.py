"""What a checkpoint holds of the training loop beside the engine and Trainer's own state, and how a resume uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allinone_ds.balance.renaming import Names, by_new_name
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.training.load_checkpoint import changes_since, read_loop_state, saved_step
from allinone_ds.training.optimizer import settings_by_name
from allinone_ds.training.start.changed_tasks import TaskChanges
from allinone_ds.zero.checkpoint.whole import optimizer_names


def loop_state(trainer: Any) -> dict[str, Any] | None:
    """Return the state of this rank's training loop, tensors and plain values; None before the first step.

    Args:
        trainer: an AllInOneTrainer.
    """
    if trainer.balancer is None:
        return None
    schedule, step = trainer.schedule, trainer.state.global_step
    return {
        "balancer": trainer.balancer.state_dict(),
        "logs": trainer._logs.state_dict(),
        "loss": trainer._tr_loss,
        "last_logged": trainer._globalstep_last_logged,
        "nonfinite": trainer._streaks.state_dict(),
        "data": schedule.basis(),
        "positions": schedule.state(step),
        "sampling": _sampling(schedule),
        "frequencies": trainer._frequencies,
        "optim": trainer.args.optim_name,
        "classes": {name: list(task.classes) for name, task in trainer.model.tasks.items()},
        "continues": dict(trainer.continues),
        "freezing": list(trainer.freezing.stages.values()),
        "parameters": optimizer_names(trainer.deepspeed),
        "groups": settings_by_name(trainer.deepspeed.optimizer),
    }


def load_loop_state(trainer: Any, state: dict[str, Any], changes: TaskChanges | None) -> None:
    """Continue the training loop of a checkpoint, once the trainer has a balancer.

    Args:
        trainer: an AllInOneTrainer.
        state: what `loop_state` returned.
        changes: of the tasks since then; None: there are none.
    """
    names = {} if changes is None else changes.names
    trainer.balancer.load_state_dict(state["balancer"], names)
    trainer._logs.load_state_dict(state["logs"], names)
    trainer._tr_loss += state["loss"].to(trainer._tr_loss.device)
    trainer._total_loss_scalar -= float(state["loss"])  # it belongs to steps before this call of train()
    trainer._globalstep_last_logged = state["last_logged"]
    trainer._streaks.load_state_dict(by_new_name(state["nonfinite"], names))


def begin_data(trainer: Any, checkpoint: Path | None) -> TaskChanges | None:
    """Let the schedule begin, or go on with the samples of a checkpoint, and say what tasks the run has.

    Args:
        trainer: an AllInOneTrainer.
        checkpoint: folder of the checkpoint to resume.

    Returns:
        How the tasks differ from those of the checkpoint; None: they do not.

    Raises:
        ConfigError: a new task cannot learn anything; for one that goes on it is a warning.
    """
    schedule, steps = trainer.schedule, trainer.args.max_steps
    schedule.continue_from(0, {})
    step, changes = 0, None
    if checkpoint is not None:
        step = saved_step(checkpoint)
        changes = changes_since(trainer.model, checkpoint, trainer.continues)
        continue_data(trainer, read_loop_state(checkpoint, trainer.args.process_index), step, changes)
    for name, task in tasks_of(trainer.model).items():
        if reason := task.constant_loss():
            if checkpoint is None or (changes is not None and name not in changes.names.values()):
                raise ConfigError(f"tasks.{name}: {reason}")
            trainer.warn(step, f"tasks.{name}: {reason}")
    if changes is not None:
        for line in (*changes.lines, "the best checkpoint is chosen anew, by the scores of these tasks"):
            trainer.note(step, f"resume: {line}")
    if schedule.sampling is not None:
        epochs = {task: schedule.epoch(task, steps) for task in schedule.tasks}
        trainer.note(step, schedule.sampling.summary(steps, epochs))
    return changes


def continue_data(trainer: Any, state: dict[str, Any], step: int, changes: TaskChanges | None) -> None:
    """Let the schedule go on with the samples of a checkpoint, and warn of what is different.

    Args:
        trainer: an AllInOneTrainer.
        state: what `loop_state` returned.
        step: optimizer step of the checkpoint.
        changes: of the tasks since then; None: there are none.
    """
    schedule, before, names = trainer.schedule, state["data"], {} if changes is None else changes.names
    positions = state.get("positions")
    if positions is None:  # a checkpoint of an earlier release, whose steps all ran every task
        images = {task: before.get(f"images of '{task}' in a step", 0) for task in schedule.tasks}
        positions = {task: (step * count, task) for task, count in images.items() if count}
    schedule.continue_from(step, by_new_name(positions, names))
    known = {_renamed_in(what, names): value for what, value in before.items()}
    changed = [
        f"{what} was {known[what]}, is {now}"
        for what, now in schedule.basis().items()
        if what in known and now != known[what] and not what.startswith("images of")
    ]
    if changed:
        trainer.warn(
            step,
            f"the order of the data changes at step {step} ({'; '.join(changed)}): in the current epochs some samples "
            "are repeated and some are omitted",
        )
    sampling = state.get("sampling", "") or "all tasks in each step", _sampling(schedule) or "all tasks in each step"
    if sampling[0] != sampling[1]:
        trainer.warn(step, f"the sampling of tasks changes at step {step}: it was {sampling[0]}, is {sampling[1]}")


def _sampling(schedule: Any) -> str:
    return "" if schedule.sampling is None else schedule.sampling.options.model_dump_json(exclude_defaults=True)


def _renamed_in(what: str, names: Names) -> str:
    """Return a text of `Schedule.basis` with the task's new name; that of a removed task is no name of a task."""
    before, quote, rest = what.partition("'")
    task, _, after = rest.partition("'")
    return f"{before}'{names.get(task, task)}'{after}" if quote else what
