"""What the arguments of `TaskBalancer` may be."""

from __future__ import annotations

from collections.abc import Iterable

from torch.nn import Module, Parameter

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.delayed import DelayedCombiner
from allinone_ds.balance.combiners.exact import exact_combiner
from allinone_ds.balance.combiners.sketched import SketchCombiner
from allinone_ds.balance.combiners.task_parallel import GroupedCombiner
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean
from allinone_ds.zero.engines.base import GradientShards

NONFINITE = ("skip_task", "skip_step", "stop")


def task_names(tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks' names, each once."""
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"tasks = {names!r}; pass at least one name, each once, each a non-empty string")
    return names


def whole(field: str, value: int) -> int:
    """A number from 0 on."""
    if not isinstance(value, int) or value < 0:
        raise ConfigError(f"{field} = {value!r}; allowed: a whole number from 0 on")
    return value


def norm_kind(norm: str, sketch_size: int | None, parallel: str) -> str:
    """`norm`, when it can be had with the two others."""
    if parallel not in ("data", "tasks"):
        raise ConfigError(f"parallel = {parallel!r}; {did_you_mean(str(parallel), ('data', 'tasks'))}")
    kinds = ("exact", "sketch", "delayed")
    if norm not in kinds:
        raise ConfigError(f"norm = {norm!r}; {did_you_mean(str(norm), kinds)}")
    if sketch_size is not None and (norm == "exact" or not isinstance(sketch_size, int) or sketch_size < 1):
        raise ConfigError(
            f"sketch_size = {sketch_size!r} with norm = {norm!r}; allowed: None, or a whole number from 1 on with "
            "norm='sketch' or norm='delayed'"
        )
    if norm == "delayed" and parallel == "tasks":
        raise ConfigError(
            "norm='delayed' with parallel='tasks': tasks on different ranks reduce once a step in any case; use "
            "norm='exact' or norm='sketch'"
        )
    return norm


def shared_parameters(module: Module, shared: str | Iterable[Parameter]) -> set[int]:
    """`id` of every trainable parameter of the backbone."""
    if isinstance(shared, str):
        modules = dict(module.named_modules())
        if shared not in modules or not shared:
            children = [name for name in modules if name and name.count(".") <= shared.count(".")]
            raise ValueError(f"shared = '{shared}': the model has no such submodule; {did_you_mean(shared, children)}")
        params = list(modules[shared].parameters())
        where = f"submodule '{shared}'"
    else:
        params = list(shared)
        where = "the iterable of parameters"
        if not all(isinstance(p, Parameter) for p in params):
            raise TypeError("shared must be a submodule's dotted name or an iterable of torch.nn.Parameter")
        own = {id(p) for p in module.parameters()}
        if any(id(p) not in own for p in params):
            raise ValueError("shared holds parameters that are not the engine's module's; take them from engine.module")
    trainable = {id(p) for p in params if p.requires_grad}
    if not trainable:
        raise ValueError(f"shared: {where} has no trainable parameter, so there is nothing to balance")
    return trainable


def combiner(
    shards: GradientShards,
    weighting: Weighting,
    norm: str,
    sketch_size: int | None,
    groups: TaskGroups,
    agreement: Agreement | None,
) -> Combiner:
    """The combiner that takes norms as `norm` says: "exact", "sketch" or "delayed".

    Args:
        groups: which ranks run which task.
        agreement: of ranks that run different tasks; None: all run all tasks.
    """
    if agreement is not None:
        return GroupedCombiner(shards, weighting, norm, sketch_size, groups, agreement)
    if norm == "sketch":
        return SketchCombiner(shards, weighting, sketch_size)
    if norm == "delayed":
        return DelayedCombiner(shards, weighting, sketch_size, groups.tasks)
    return exact_combiner(shards, weighting)
