"""Memory of one GPU, by part, from the sizes of a model and the settings of its engine."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.balance.combiners.sketch import held_bytes
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.model import AllInOneModel
from allinone_ds.models.lora import adapter_of, shared_parameters
from allinone_ds.run_config.engine_settings import Engine


class JointTasks(NamedTuple):
    """A joint group: its tasks, and where its gradients are balanced.

    Example:
        >>> JointTasks(("seg", "depth"), "features").at
        'features'
    """

    tasks: Sequence[str]
    """Names of the tasks."""
    at: str
    """"backbone" or "features"."""


class Passes(NamedTuple):
    """The passes of one task, or of one joint group, through the model in an optimizer step.

    Example:
        >>> Passes(forward=120, backwards=[110, 110], micro_steps=4, joint=True).micro_steps
        4
    """

    forward: int
    """Trained elements of what a forward runs."""
    backwards: Sequence[int]
    """Trained elements of what each backward of a micro-step runs."""
    micro_steps: int
    """Forwards per step."""
    joint: bool = False
    """Whether gradients are averaged over the ranks in every micro-step; else where the engine keeps none, in one."""
    chance: float = 1.0
    """Share of the steps that run them."""


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's parameters.

    Attributes:
        backbone: trained elements of the shared backbone.
        heads: task -> trained elements of its head, its own adapters included, that no other task has.
        micro_steps: task -> micro-steps per optimizer step.
        frozen: elements that are not trained.
        frozen_below: those of them that are used before the first trained parameter, so not in a backward.
        joint: the joint groups.
        chance: task -> share of the steps that run it, of tasks that are sampled; empty: every step runs all.
        tied: tasks -> trained elements that the heads of all these tasks have, and no others.
    """

    backbone: int
    heads: Mapping[str, int]
    micro_steps: Mapping[str, int]
    frozen: int = 0
    frozen_below: int = 0
    joint: Sequence[JointTasks] = ()
    chance: Mapping[str, float] = field(default_factory=dict)
    tied: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def of_heads(self, tasks: Iterable[str]) -> int:
        """Return the trained elements of the heads of some tasks, those that they share once.

        Example:
            >>> Sizes(900, {"a": 60, "b": 40}, {"a": 1, "b": 1}, tied={("a", "b"): 8}).of_heads(["a", "b"])
            108
        """
        names = set(tasks)
        shared = sum(count for owners, count in self.tied.items() if names & set(owners))
        return sum(self.heads[name] for name in names) + shared

    @property
    def passes(self) -> list[Passes]:
        """The forwards and backwards of a step: those of each joint group, and of each other task."""
        alone = list(self.heads)
        found = []
        for group in self.joint:
            heads = [self.of_heads([task]) for task in group.tasks]
            whole = self.backbone + self.of_heads(group.tasks)
            backwards = [whole] if group.at == "features" else [self.backbone + head for head in heads]
            first = group.tasks[0]
            found.append(Passes(whole, backwards, self.micro_steps[first], True, self.chance.get(first, 1.0)))
            alone = [task for task in alone if task not in group.tasks]
        for task in alone:
            whole, chance = self.backbone + self.of_heads([task]), self.chance.get(task, 1.0)
            found.append(Passes(whole, [whole], self.micro_steps[task], chance=chance))
        return found

    @property
    def trained(self) -> int:
        """Trained elements of the model."""
        return self.backbone + self.of_heads(self.heads)

    @property
    def trained_in_step(self) -> float:
        """Trained elements of what runs in a step, on average; what heads share, as if no step ran two of them."""
        parts: dict[tuple[str, ...], int] = {(task,): count for task, count in self.heads.items()}
        parts.update(self.tied)
        chances = {tasks: min(sum(self.chance.get(task, 1.0) for task in tasks), 1.0) for tasks in parts}
        return self.backbone + sum(count * chances[tasks] for tasks, count in parts.items())

    @property
    def whole(self) -> int:
        """Elements of the model."""
        return self.trained + self.frozen

    @property
    def largest_forward(self) -> int:
        """Trained elements of the largest forward."""
        return max(passes.forward for passes in self.passes)

    @property
    def largest_backward(self) -> int:
        """Trained elements of the largest backward."""
        return max(max(passes.backwards) for passes in self.passes)


def sizes_of(
    model: AllInOneModel,
    micro_steps: Mapping[str, int],
    joint: Sequence[JointTasks] = (),
    chance: Mapping[str, float] = MappingProxyType({}),
) -> Sizes:
    """Return the sizes of a model on any device, also on the meta device; see `Sizes`.

    A parameter counts once: as the backbone's if it is tied to a head, and in `tied` if it is tied between heads.
    """
    below = itertools.takewhile(lambda p: not p.requires_grad, model.backbone.parameters())
    shared = set(shared_parameters(model.backbone))
    owners: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, parameter in model.backbone.named_parameters():
        if parameter not in shared:  # adapters of single tasks: they count as their heads
            owners[parameter] = (str(adapter_of(name)),)
    for name, task in model.tasks.items():
        for parameter in set(task.parameters()) - shared:
            owners[parameter] = (*owners.get(parameter, ()), name)
    counts: Counter[tuple[str, ...]] = Counter()
    for parameter, tasks in owners.items():
        counts[tasks] += parameter.numel() if parameter.requires_grad else 0
    return Sizes(
        backbone=sum(p.numel() for p in shared if p.requires_grad),
        heads={name: counts.pop((name,), 0) for name in model.tasks},
        tied={tasks: count for tasks, count in counts.items() if count},
        micro_steps=micro_steps,
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        frozen_below=sum(p.numel() for p in below),
        joint=joint,
        chance=chance,
    )


def kept_shards(weighting: Weighting, sizes: Sizes) -> int:
    """Return the gradient shards that the balancer keeps with exact norms.

    Args:
        weighting: one that scales a task's gradient before it knows those of the others keeps one, others T.
        sizes: sizes of the model. A joint group at the backbone with several micro-steps keeps one per task, beside
            that of the tasks before it.
    """
    if not weighting.streams:
        return len(sizes.heads)
    several = [len(p.backwards) for p in sizes.passes if p.joint and p.micro_steps > 1]
    return 1 + max(several, default=0)


def memory_parts(
    engine: Engine,
    sizes: Sizes,
    gpus: int,
    norm: str,
    moments: float,
    kept: int,
    sketch: int,
    averaged: bool = False,
    groups: TaskGroups | None = None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return bytes by part on one GPU, and in the host's memory per GPU; without activations.

    Args:
        engine: settings of the engine.
        sizes: sizes of the model, with P trained elements.
        gpus: number of ranks R.
        norm: "exact", "sketch", "delayed" or "features".
        moments: tensors of P elements that the optimizer keeps in addition to its copy of the weights, on average.
        kept: gradient shards that the balancer keeps with exact norms: 1, or T for weightings that need all tasks
            before they scale one.
        sketch: elements of a sketch.
        averaged: whether an average of the weights is kept (`ema_decay`).
        groups: ranks of each task; None: every rank runs every task.
    """
    P = sizes.trained
    part = P if engine.stage == 0 else -(-P // gpus)
    weights = engine.weight_bytes * (-(-sizes.whole // gpus) if engine.stage == 3 else sizes.whole)
    # ZeRO 1 to 3 copies the weights for the optimizer even where they are float32
    copies = 0 if engine.stage == 0 and engine.weight_bytes == 4 else 1
    optimizer = round(part * (engine.master_bytes * copies + engine.state_bytes * moments))
    average = {"average of the weights": engine.master_bytes * part} if averaged else {}
    # norm="delayed": its first step is exact
    balancer = engine.master_bytes * part * (1 if norm == "sketch" or groups else kept)
    if norm == "features":
        balancer = 0
    local = bool(groups) or norm in ("sketch", "delayed") or (norm == "features" and engine.stage < 2)
    if groups:
        most = max(len(groups.of(rank)) for rank in range(gpus))
        balancer += (most - 1) * sizes.backbone * engine.gradient_bytes
        balancer += held_bytes(sketch) * len(sizes.heads) if norm == "sketch" else 0
    elif norm == "sketch":
        balancer += sizes.backbone * engine.gradient_bytes + held_bytes(sketch)
    elif norm == "delayed":
        balancer += held_bytes(sketch) * len(sizes.heads)
    memory = {"weights": weights, "gradients": _gradients(engine, sizes, gpus, local)}
    if engine.stage == 3 and engine.copied_within > 1:
        copied = sizes.whole - kept_elements(engine, sizes, norm)
        memory["weights within a node"] = engine.weight_bytes * -(-copied // min(engine.copied_within, gpus))
    # DeepSpeed reduces what has accumulated on ZeRO-1, and each gradient as it comes on ZeRO-2 and 3
    in_buffers = engine.gradient_bytes if engine.stage == 1 else engine.weight_bytes
    buffers = 0 if engine.stage == 0 or engine.wraps_bf16 else engine.bucket * engine.buckets * in_buffers
    buffers += engine.weight_bytes * _gathered(engine, sizes, norm)
    if local and engine.fp32_accumulation:  # for the reduced local gradients
        buffers += 4 * part
    movable = {"optimizer": optimizer, "balancer": balancer, **average}
    if engine.offload:
        return {**memory, "buffers": buffers}, movable
    return {**memory, **movable, "buffers": buffers}, {}


def _gathered(engine: Engine, sizes: Sizes, norm: str) -> int:
    """Return the largest number of elements of weights that ZeRO-3 has gathered at one time.

    Every module that runs prefetches one more bucket, whatever is prefetched already, up to the live limit.
    """
    if engine.stage < 3:
        return 0
    kept = kept_elements(engine, sizes, norm)
    if kept == sizes.whole:
        return kept
    ahead = engine.live if engine.prefetched else 0
    most = max(ahead, engine.retained, kept + sizes.largest_forward - sizes.backbone if kept else 0)
    return min(most, sizes.largest_forward + sizes.frozen)


def kept_elements(engine: Engine, sizes: Sizes, norm: str) -> int:
    """Return the elements of weights that ZeRO-3 keeps gathered over a step, as `ParameterTraces` chooses them."""
    if engine.stage < 3 or not engine.task_traces or norm == "plain":
        return 0
    if sizes.whole <= min(engine.retained, engine.live):
        return sizes.whole
    return max(min(engine.retained, engine.live - engine.prefetched, sizes.backbone + sizes.frozen), 0)


def _gradients(engine: Engine, sizes: Sizes, gpus: int, local: bool) -> int:
    """Return the bytes of gradients on one GPU; `local`: they stay unreduced on the rank for the whole step."""
    P, part = sizes.trained, -(-sizes.trained // gpus)
    shard = part * engine.gradient_bytes
    if engine.wraps_bf16:  # the whole gradient, in both dtypes
        return P * 4 + sizes.largest_backward * engine.weight_bytes
    if local:  # the whole gradient, and the buffer that ZeRO-3 always has
        return P * engine.weight_bytes + (shard if engine.stage == 3 else 0)
    if engine.stage == 0:
        return P * engine.weight_bytes
    if engine.stage == 1:  # unreduced until the task's last micro-step
        return sizes.largest_backward * engine.gradient_bytes + (shard if engine.fp32_accumulation else 0)
    return shard
