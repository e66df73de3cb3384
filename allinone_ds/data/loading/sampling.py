"""Which tasks run in an optimizer step: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from allinone_ds.data.loading.seeds import random_state
from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict, did_you_mean

_BLOCK = 1024  # steps that are drawn together
_CERTAIN = 1 - 1e-9
Curve = dict[NonNegativeInt, NonNegativeFloat]


class Sampling(Strict):
    """Which tasks run in an optimizer step. A joint group runs as a whole and is named in place of its tasks.

    A step runs `tasks_per_step` of the tasks, drawn without replacement, and those of `every` whose turn it is. Task t
    with weight w_t is in a step with probability min(1, c w_t^(1/T)), where c makes these probabilities add up to
    `tasks_per_step`. With T above 1 small tasks get a larger part than their weights say.

    Example:
        >>> Sampling(tasks_per_step=1, weights={"det": 3, "seg": {0: 0, 1000: 1}}).weights["seg"]
        {0: 0.0, 1000: 1.0}
    """

    tasks_per_step: PositiveInt | None = None
    """Tasks and joint groups that are drawn for a step; null: all but those of `every` and `start` run in each step."""
    weights: Literal["uniform", "size"] | dict[str, NonNegativeFloat | Curve] = "uniform"
    """How often a task is drawn: "uniform"; "size", the number of its training samples; or a number for each task, or
    {step: number}, between which the weight is interpolated and which is constant before the first and after the last.
    """
    temperature: PositiveFloat = 1.0
    """T: weights are raised to the power 1 / T."""
    every: dict[str, PositiveInt] = Field(default_factory=dict)
    """{task: n}: the task is not drawn, it runs in every n-th step, the first of them its step of `start`."""
    start: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """{task: step}: the task does not run before this step."""

    @field_validator("weights")
    @classmethod
    def _curves_have_points(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, weight in value.items():
                if isinstance(weight, dict) and not weight:
                    raise ConfigError(f"sampling.weights.{name} is empty; give a number, or {{step: number}}")
        return value

    def check_names(self, names: Collection[str]) -> None:
        """Refuse settings that do not fit the tasks and joint groups of a run.

        Args:
            names: of the tasks that have images of their own, and of the joint groups.

        Raises:
            ConfigError: names the key and what to do.
        """
        weights = self.weights if isinstance(self.weights, dict) else {}
        for key, values in (("every", self.every), ("start", self.start), ("weights", weights)):
            for name in values:
                if name not in names:
                    raise ConfigError(
                        f"sampling.{key}.{name}: the run has no such task or joint group (a task of a group runs with "
                        f"its group); {did_you_mean(name, names)}"
                    )
        drawn = [name for name in names if name not in self.every]
        if self.tasks_per_step is None:
            for key in ("weights", "temperature"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ConfigError(
                        f"sampling.{key} has no effect: all tasks run in each step; set sampling.tasks_per_step, or "
                        "remove the key"
                    )
        elif self.tasks_per_step >= len(drawn):
            raise ConfigError(
                f"sampling.tasks_per_step = {self.tasks_per_step}: nothing to choose, there are {len(drawn)} tasks and "
                "joint groups that `every` does not name; give a smaller number, or remove the key"
            )
        for name in drawn if weights else ():
            if name not in weights:
                raise ConfigError(f"sampling.weights has no number for '{name}'; give one to every task that is drawn")
        for name in weights:
            if name in self.every:
                raise ConfigError(f"sampling.weights.{name}: sampling.every.{name} says when it runs; remove one")


class TaskSampling:
    """The tasks of every optimizer step, computed from (seed, step) alone.

    Tasks are drawn by systematic sampling (Madow, 1949): the probabilities of the tasks, in a random order, divide an
    interval of length n; of the n points u, u + 1, ... with a random u below 1 each chooses the task that it hits.
    Therefore a step has exactly n different tasks, and each of them its probability.

    Args:
        options: see `Sampling`.
        sizes: {task or joint group: number of training samples}, in the order in which they run in a step.
        seed: seed of the run.

    Raises:
        ConfigError: the options do not fit the tasks.

    Example:
        >>> sampling = TaskSampling(Sampling(tasks_per_step=1, weights="size"), {"det": 300, "seg": 100}, seed=0)
        >>> [sampling.tasks(step) for step in range(4)]
        [('det',), ('det',), ('seg',), ('det',)]
        >>> sampling.runs("det", 1000)
        745
    """

    def __init__(self, options: Sampling, sizes: Mapping[str, int], seed: int) -> None:
        options.check_names(sizes)
        self.options = options
        self.seed = seed
        self.names = tuple(sizes)
        self._column = {name: column for column, name in enumerate(self.names)}
        self._weights: list[float | Curve]
        if options.weights == "size":
            self._weights = [float(size) for size in sizes.values()]
        elif isinstance(options.weights, dict):
            self._weights = [options.weights.get(name, 0.0) for name in self.names]
        else:
            self._weights = [1.0] * len(self.names)
        self._blocks: dict[int, np.ndarray] = {}
        self._totals = [np.zeros(len(self.names), dtype=np.int64)]  # runs of each task before each block
        self._empty: list[int] = []  # the first step of these blocks without a task, if there is one

    def tasks(self, step: int) -> tuple[str, ...]:
        """Return the tasks of a step, in their order."""
        row = self._block(step // _BLOCK)[step % _BLOCK]
        return tuple(name for name, runs in zip(self.names, row, strict=True) if runs)

    def runs(self, name: str, step: int) -> int:
        """Return the number of steps before `step` in which a task runs."""
        block, rest = divmod(step, _BLOCK)
        while len(self._totals) <= block:
            number = len(self._totals) - 1
            drawn = self._block(number)
            self._totals.append(self._totals[-1] + drawn.sum(0))
            self._empty += [] if self._empty else (number * _BLOCK + np.flatnonzero(~drawn.any(1)))[:1].tolist()
        column = self._column[name]
        return int(self._totals[block][column] + (self._block(block)[:rest, column].sum() if rest else 0))

    def steps_for(self, name: str, runs: int, most: int = 100_000_000) -> int:
        """Return the number of steps after which a task has run `runs` times.

        Raises:
            ConfigError: it does not in the first `most` steps.
        """
        step = 0
        while self.runs(name, step + _BLOCK) < runs:
            step += _BLOCK
            if step >= most or (step >= 1000 * _BLOCK and not self.runs(name, step)):
                raise ConfigError(
                    f"sampling: '{name}' runs in {self.runs(name, step)} of the first {step} steps, epochs asks for "
                    f"{runs}; give it a larger weight"
                )
        inside = np.cumsum(self._block(step // _BLOCK)[:, self._column[name]])
        return step + int(np.searchsorted(inside, runs - self.runs(name, step))) + 1

    def check_run(self, steps: int) -> None:
        """Refuse a run with a task that never runs, or a step without any task.

        Args:
            steps: optimizer steps of the run.

        Raises:
            ConfigError: names the task, or the step.
        """
        runs = {name: self.runs(name, steps) for name in self.names}
        never = [f"'{name}'" for name, count in runs.items() if not count]
        if never:
            counts = sorted(count for count in runs.values() if count)
            raise ConfigError(
                f"sampling: none of the {steps} steps runs {', '.join(never)} (the others run in {counts[0]} to "
                f"{counts[-1]} steps); give a larger weight, an earlier start or the run more steps, or remove the task"
            )
        self.runs(self.names[0], -(-steps // _BLOCK) * _BLOCK)
        if self._empty and self._empty[0] < steps:
            raise ConfigError(
                f"sampling: no task runs in step {self._empty[0]}; let a task start earlier or run more often, or give "
                "one a weight above 0 there"
            )

    def summary(self, steps: int, epochs: Mapping[str, float]) -> str:
        """Return a text that says in how many steps of a run each task runs.

        Args:
            steps: optimizer steps of the run.
            epochs: {task: epochs of its data in the run}.
        """
        counts = [f"{name} {self.runs(name, steps)} ({epochs[name]:.3g} epochs)" for name in self.names]
        return f"sampling: of {steps} steps, tasks run in: {', '.join(counts)}"

    def _block(self, block: int) -> np.ndarray:
        """Return which tasks run in the steps of a block, (steps, T) bool."""
        if block not in self._blocks:
            if len(self._blocks) >= 4:  # workers read ahead, and logs look back
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = self._drawn(block)
        return self._blocks[block]

    def _drawn(self, block: int) -> np.ndarray:
        steps = np.arange(block * _BLOCK, (block + 1) * _BLOCK)  # (S,)
        started = np.stack([steps >= self.options.start.get(name, 0) for name in self.names], axis=1)  # (S, T)
        fixed = np.zeros_like(started)
        for name, every in self.options.every.items():
            column = self._column[name]
            fixed[:, column] = (steps - self.options.start.get(name, 0)) % every == 0
        drawn = np.array([name not in self.options.every for name in self.names])
        count = self.options.tasks_per_step
        if count is None:
            return started & (fixed | drawn)
        weights = np.stack([_at(weight, steps) for weight in self._weights], axis=1) ** (1 / self.options.temperature)
        uniform = random_state(self.seed, "tasks", block).random_sample((_BLOCK, len(self.names) + 1))
        return started & fixed | _systematic(_probabilities(weights * (started & drawn), count), uniform)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": {}}


def _at(weight: float | Curve, steps: np.ndarray) -> np.ndarray:
    """Return the weight at each step."""
    if not isinstance(weight, dict):
        return np.full(len(steps), float(weight))
    points = sorted(weight.items())
    return np.interp(steps, [step for step, _ in points], [value for _, value in points])


def _probabilities(weights: np.ndarray, count: int) -> np.ndarray:
    """Return the probabilities (S, T) of the tasks, in the ratio of their weights, at most 1, with the sum `count`.

    Where fewer than `count` tasks have a weight above 0, all of these have probability 1.
    """
    certain = np.zeros(weights.shape, dtype=bool)
    while True:
        open_weights = np.where(certain, 0.0, weights)
        total = np.cumsum(open_weights, axis=1)[:, -1:]  # in the same order on every machine
        left = count - certain.sum(1, keepdims=True)
        chances = np.divide(left * open_weights, total, out=np.zeros_like(weights), where=total > 0)
        further = chances >= _CERTAIN
        if not further.any():
            return np.where(certain, 1.0, chances)
        certain |= further


def _systematic(chances: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return which tasks are drawn, (S, T) bool.

    Args:
        chances: probabilities (S, T), whose sums over tasks are integers.
        uniform: numbers from 0 to below 1, (S, T + 1): T for the random order, one for the place of the points.
    """
    certain = chances >= _CERTAIN
    order = np.argsort(uniform[:, :-1], axis=1, kind="stable")
    ends = np.cumsum(np.take_along_axis(np.where(certain, 0.0, chances), order, axis=1), axis=1)
    total = np.round(ends[:, -1:])
    ends = np.where(ends > total - 1e-9, total, ends)
    hits = np.ceil(np.concatenate([np.zeros((len(ends), 1)), ends], axis=1) - uniform[:, -1:])
    drawn = np.zeros_like(certain)
    np.put_along_axis(drawn, order, np.diff(hits, axis=1) > 0, axis=1)
    return drawn | certain
