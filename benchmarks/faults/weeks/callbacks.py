"""Callbacks of the run, named in its YAML file: losses that are not finite, and the step that it has reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def spoiled(step: int, every: int, tasks: int, ranks: int) -> tuple[int, int] | None:
    """Return the task and the rank whose loss is NaN in a step; None if it is none.

    Args:
        step: optimizer step, from 0.
        every: number of steps between two such losses.
        tasks: number of tasks.
        ranks: number of ranks.

    Example:
        >>> [spoiled(step, 100, 3, 4) for step in (98, 99, 199, 499)]
        [None, (0, 0), (1, 1), (1, 0)]
    """
    number, place = divmod(step, every)
    return (number % tasks, number % ranks) if place == every - 1 else None


class NanLosses(TrainerCallback):
    """Multiplies the loss of one task on one rank by NaN in every n-th step: the same ones in every start of the run.

    Args:
        every: n.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        names = list(model.tasks)

        def spoil(number: int, module: Any, out: Any) -> None:
            if module.training and spoiled(self.step, self.every, len(names), args.world_size) == (
                number,
                args.process_index,
            ):
                out.loss = out.loss * float("nan")

        for number, name in enumerate(names):
            model.tasks[name].register_forward_hook(lambda module, _, out, number=number: spoil(number, module, out))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


class Progress(TrainerCallback):
    """Writes the number of optimizer steps that the run has made to a file after each of them.

    Args:
        file: path of the file.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.file.write_text(str(state.global_step))
