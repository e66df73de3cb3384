"""A program: one engine, one model, one balancer, and what a training loop does with them, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from allinone_ds.balance.options import combination_error, weighting_from_config
from allinone_ds.testing.cases import Case

TRAITS = ("unused", "frozen", "checkpointing", "nested", "tied", "backbone tied", "neck", "late", "head only", "scalar")
WEIGHTINGS: tuple[dict[str, Any], ...] = (
    {"name": "sum"}, {"name": "global_clip", "max_norm": 0.05}, {"name": "task_clip", "max_norm": 0.05},
    {"name": "tbgc", "max_norm": 0.05}, {"name": "tbgc", "max_norm": 0.05, "rescale": "always"},
    {"name": "tbgc", "max_norm": 0.05, "heads": "none"}, {"name": "tbgc", "target": "max", "rescale": "always"},
    {"name": "tbgc", "target": "median"}, {"name": "db_mtl", "beta": 0.5}, {"name": "gradnorm"},
    {"name": "uncertainty"}, {"name": "dwa", "window": 20}, {"name": "famo"}, {"name": "random", "seed": 3},
    {"name": "static"}, {"name": "aligned_mtl"}, {"name": "imtl_g"}, {"name": "upgrad"}, {"name": "mgda"},
    {"name": "cagrad", "c": 0.4},
)  # fmt: skip
"""Weightings and options; "static" gets weights for the program's tasks."""
ENGINES: tuple[dict[str, Any], ...] = (
    *({"stage": stage} for stage in (0, 1, 2, 3, 1, 2, 3)),
    *({"stage": stage, "offload": True} for stage in (1, 2, 3)),
    *({"stage": stage, "dtype": "bf16"} for stage in (0, 1, 2, 3)),
    *({"stage": stage, "dtype": "bf16", "accumulate": "fp32"} for stage in (1, 2, 3)),
    *({"stage": stage, "dtype": "fp16"} for stage in (0, 1, 2, 3)),
)
EVENTS = ("raise", "raise on one rank", "raise in step", "abandon", "reload", "nan", "evaluate")
PLACES = ("before the first backward", "after the first backward", "at the end", "in a hook")


@dataclass(frozen=True)
class Program:
    """Everything that one run of the fuzzer does; plain values, so that it can be written as JSON.

    Args:
        world: number of ranks.
        engine: fields of `allinone_ds.testing.cases.Case` but its name.
        optimizer: "sgd", "momentum" or "adamw", each but the first with weight decay.
        model: arguments of `FuzzModel`.
        weighting: as in a run's `balancer:` block.
        options: of `TaskBalancer`.
        loss_from: "engine", "module" (of the engine) or "forwards first" (all forwards of a task, then all backwards).
        steps: of each step its "tasks" (name, micro-steps), "batch" size, for parallel="tasks" the "groups", and its
            "event": None, or its "kind", the "task" and "place" where it happens, and whether the "task" or the whole
            "step" runs "again" after an error.
    """

    world: int
    engine: dict[str, Any]
    optimizer: str
    model: dict[str, Any]
    weighting: dict[str, Any]
    options: dict[str, Any]
    loss_from: str = "engine"
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def case(self) -> Case:
        """The engine."""
        return Case("fuzz", **self.engine)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks."""
        return tuple(self.model["tasks"])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def draw_program(rng: random.Random) -> Program:
    """Return a program that the package claims to serve."""
    world = rng.choice((1, 2, 2, 2, 3))
    engine = dict(rng.choice(ENGINES))
    exact = engine.get("dtype", "fp32") == "fp32"
    engine["zero"] = _draw_zero(rng, engine["stage"], exact)
    engine["one_group"] = rng.random() < 0.3
    names = rng.sample(("det", "seg", "cls", "depth", "normals"), rng.randint(1, 4))
    factors = (0.1, 1.0, 9.0, 60.0) if exact else (0.3, 1.0, 4.0)  # rounding grows with the weights
    model = {
        "tasks": {name: rng.choice(factors) for name in names},
        "width": rng.choice((3, 7, 13)),
        "depth": rng.randint(1, 3),
        "traits": sorted(rng.sample(TRAITS, rng.choice((0, 1, 2, 3, 4)))),
    }
    weighting, options = _draw_balancer(rng, engine, names)
    loss_from = rng.choice(("engine", "engine", "engine", "module", "forwards first"))
    if "checkpointing" in model["traits"] and engine["stage"] == 3:
        loss_from = "engine"
    optimizer = rng.choice(("sgd", "momentum", "adamw")) if exact else "sgd"
    program = Program(world, engine, optimizer, model, weighting, options, loss_from)
    steps = [_draw_step(rng, program) for _ in range(rng.randint(2, 6))]
    return replace(program, steps=steps)


def _draw_zero(rng: random.Random, stage: int, exact: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"reduce_bucket_size": rng.choice((50, 400, 10**6))}
    if stage in (1, 2):
        zero |= {"overlap_comm": rng.random() < 0.5, "contiguous_gradients": rng.random() < 0.5}
        zero["allgather_bucket_size"] = rng.choice((50, 10**6))
        # in 16 bit DeepSpeed's `safe_get_full_fp32_param` ignores the round robin, so weights could not be compared
        if stage == 2 and exact and rng.random() < 0.2:
            zero["round_robin_gradients"] = True
    if stage == 3:
        zero |= {"overlap_comm": rng.random() < 0.5, "sub_group_size": rng.choice((40, 10**9))}
    return zero


def _draw_balancer(
    rng: random.Random, engine: dict[str, Any], names: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a weighting and options that the engine serves together."""
    stage, offload = engine["stage"], engine.get("offload", False)
    local = stage > 0 and not (stage == 1 and engine.get("accumulate") and not offload)
    while True:
        weighting = dict(rng.choice(WEIGHTINGS))
        if weighting["name"] == "static":
            weighting["weights"] = {name: rng.choice((0.5, 2.0)) for name in names}
        options: dict[str, Any] = {"norm": rng.choice(("exact", "exact", "exact", "sketch", "delayed"))}
        options["parallel"] = rng.choice(("data", "data", "data", "tasks"))
        made = weighting_from_config(weighting)
        if combination_error(options["norm"], options["parallel"], made, stage, local) is None:
            break
    options |= {"cosines_every": rng.choice((0, 0, 1, 2)), "task_traces": rng.random() < 0.8}
    options["nonfinite"] = rng.choice(("skip_task", "skip_task", "skip_step"))
    return weighting, options


def _draw_step(rng: random.Random, program: Program) -> dict[str, Any]:
    tasks, world = list(program.tasks), program.world
    rng.shuffle(tasks)
    absent_tasks_are_exact = program.optimizer != "adamw" or not program.engine["one_group"]
    if absent_tasks_are_exact and rng.random() < 0.25:
        tasks = tasks[: rng.randint(1, len(tasks))]
    step: dict[str, Any] = {
        "tasks": [[task, rng.choice((1, 1, 2, 3))] for task in tasks],
        "batch": rng.randint(1, 4),
        "event": None,
    }
    if program.options["parallel"] == "tasks":
        step["groups"] = _draw_groups(rng, program.tasks, world)
    if rng.random() < 0.4:
        kind = rng.choice(EVENTS)
        if kind == "nan" and not absent_tasks_are_exact:
            kind = "evaluate"
        if kind == "raise on one rank" and (program.engine["stage"] == 3 or program.options["parallel"] == "tasks"):
            kind = "raise"  # under ZeRO-3 the other ranks wait inside a forward, and the job has to start again
        again = "task" if program.options["parallel"] == "tasks" else rng.choice(("task", "step"))
        if program.options["norm"] == "delayed":  # an error drops all tasks of the step
            again = "step"
        # an error of one rank inside a backward leaves the others in its reduction, and the job has to start again
        places = PLACES[:-1] if kind == "raise on one rank" else PLACES
        step["event"] = {"kind": kind, "task": rng.choice(tasks), "place": rng.choice(places), "again": again}
    return step


def _draw_groups(rng: random.Random, tasks: tuple[str, ...], world: int) -> dict[str, list[int]]:
    """Return task -> its ranks; two tasks have the same ranks or none in common, and every rank has a task."""
    count = rng.randint(1, min(len(tasks), world))
    ranks, order = list(range(world)), list(tasks)
    rng.shuffle(ranks)
    rng.shuffle(order)
    groups = [sorted(ranks[number::count]) for number in range(count)]
    return {task: groups[number % count] for number, task in enumerate(order)}


def simpler_programs(program: Program) -> Iterator[Program]:
    """Yield programs that do less than this one, those that do much less first."""
    for count in range(1, len(program.steps)):
        yield replace(program, steps=program.steps[:count])
    for index, step in enumerate(program.steps):
        if len(program.steps) > 1:
            yield replace(program, steps=program.steps[:index] + program.steps[index + 1 :])
        if step["event"]:
            yield _with_step(program, index, event=None)
    if len(program.tasks) > 1:
        for task in program.tasks:
            yield from _without_task(program, task)
    for trait in program.model["traits"]:
        left = [other for other in program.model["traits"] if other != trait]
        yield replace(program, model={**program.model, "traits": left})
    if program.world > 1 and program.options["parallel"] == "data":
        yield replace(program, world=program.world - 1)
    for key in program.engine["zero"]:
        yield replace(
            program, engine={**program.engine, "zero": {k: v for k, v in program.engine["zero"].items() if k != key}}
        )
    for key in ("offload", "one_group", "accumulate", "dtype"):
        if program.engine.get(key):
            yield replace(program, engine={k: v for k, v in program.engine.items() if k != key})
    for key, plain in (("cosines_every", 0), ("task_traces", True), ("nonfinite", "skip_task"), ("norm", "exact")):
        if program.options[key] != plain:
            yield replace(program, options={**program.options, key: plain})
    for change in ({"optimizer": "sgd"}, {"loss_from": "engine"}, {"weighting": {"name": "sum"}}):
        if any(getattr(program, key) != value for key, value in change.items()):
            yield replace(program, **change)
    for key, least in (("width", 3), ("depth", 1)):
        if program.model[key] > least:
            yield replace(program, model={**program.model, key: least})
    if any(factor != 1.0 for factor in program.model["tasks"].values()):
        yield replace(program, model={**program.model, "tasks": dict.fromkeys(program.tasks, 1.0)})
    for index, step in enumerate(program.steps):
        if any(count > 1 for _, count in step["tasks"]):
            yield _with_step(program, index, tasks=[[task, 1] for task, _ in step["tasks"]])
        if step["batch"] > 1:
            yield _with_step(program, index, batch=1)


def _with_step(program: Program, index: int, **changes: Any) -> Program:
    steps = list(program.steps)
    steps[index] = {**steps[index], **changes}
    return replace(program, steps=steps)


def _without_task(program: Program, task: str) -> Iterator[Program]:
    steps = []
    for step in program.steps:
        tasks = [pair for pair in step["tasks"] if pair[0] != task]
        event = step["event"] if not step["event"] or step["event"]["task"] != task else None
        if tasks:
            steps.append({**step, "tasks": tasks, "event": event})
        if "groups" in step:
            groups = {name: ranks for name, ranks in step["groups"].items() if name != task}
            if {rank for ranks in groups.values() for rank in ranks} != set(range(program.world)):
                return
            if tasks:
                steps[-1]["groups"] = groups
    factors = {name: factor for name, factor in program.model["tasks"].items() if name != task}
    weighting = dict(program.weighting)
    if "weights" in weighting:
        weighting["weights"] = {name: value for name, value in weighting["weights"].items() if name != task}
    if steps:
        yield replace(program, model={**program.model, "tasks": factors}, weighting=weighting, steps=steps)
