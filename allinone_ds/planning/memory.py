"""Memory and traffic of one GPU, by part, from the sizes of a model and the settings of its engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from allinone_ds.balance.assignment import TaskGroups
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


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's parameters.

    Attributes:
        backbone: trained elements of the shared backbone.
        heads: task -> trained elements of its head.
        micro_steps: task -> micro-steps per optimizer step.
        frozen: elements that are not trained.
        joint: the joint groups.
    """

    backbone: int
    heads: Mapping[str, int]
    micro_steps: Mapping[str, int]
    frozen: int = 0
    joint: Sequence[JointTasks] = ()

    @property
    def passes(self) -> list[Passes]:
        """The forwards and backwards of a step: those of each joint group, and of each other task."""
        alone = dict(self.heads)
        found = []
        for group in self.joint:
            heads = [alone.pop(task) for task in group.tasks]
            whole = self.backbone + sum(heads)
            backwards = [whole] if group.at == "features" else [self.backbone + head for head in heads]
            found.append(Passes(whole, backwards, self.micro_steps[group.tasks[0]], joint=True))
        for task, head in alone.items():
            found.append(Passes(self.backbone + head, [self.backbone + head], self.micro_steps[task]))
        return found

    @property
    def trained(self) -> int:
        """Trained elements of the model."""
        return self.backbone + sum(self.heads.values())

    @property
    def largest_forward(self) -> int:
        """Trained elements of the largest forward."""
        return max(passes.forward for passes in self.passes)

    @property
    def largest_backward(self) -> int:
        """Trained elements of the largest backward."""
        return max(max(passes.backwards) for passes in self.passes)


def sizes_of(model: AllInOneModel, micro_steps: Mapping[str, int], joint: Sequence[JointTasks] = ()) -> Sizes:
    """Return the sizes of a model on any device, also on the meta device; see `Sizes`."""

    def trained(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters if p.requires_grad)

    adapters: Counter[str | None] = Counter()  # of single tasks: they count as their heads
    for name, parameter in model.backbone.named_parameters():
        adapters[adapter_of(name)] += parameter.numel() if parameter.requires_grad else 0
    return Sizes(
        backbone=trained(shared_parameters(model.backbone)),
        heads={name: trained(task.parameters()) + adapters[name] for name, task in model.tasks.items()},
        micro_steps=micro_steps,
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        joint=joint,
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
    moments: int,
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
        moments: float32 tensors of P elements that the optimizer keeps in addition to its copy of the weights.
        kept: gradient shards that the balancer keeps with exact norms: 1, or T for weightings that need all tasks
            before they scale one.
        sketch: elements of a sketch.
        averaged: whether an average of the weights is kept (`ema_decay`).
        groups: ranks of each task; None: every rank runs every task.
    """
    P = sizes.trained
    part = P if engine.stage == 0 else -(-P // gpus)
    whole_weights = P + sizes.frozen
    weights = engine.weight_bytes * (-(-whole_weights // gpus) if engine.stage == 3 else whole_weights)
    # ZeRO 1 to 3 copies the weights for the optimizer even where they are float32
    copies = 0 if engine.stage == 0 and engine.weight_bytes == 4 else 1
    optimizer = 4 * part * (copies + moments)
    average = {"average of the weights": 4 * part} if averaged else {}
    balancer = 4 * part * (1 if norm == "sketch" or groups else kept)  # norm="delayed": its first step is exact
    if norm == "features":
        balancer = 0
    local = bool(groups) or norm in ("sketch", "delayed") or (norm == "features" and engine.stage < 2)
    if groups:
        most = max(len(groups.of(rank)) for rank in range(gpus))
        balancer += (most - 1) * sizes.backbone * engine.gradient_bytes
        balancer += 2 * 4 * sketch * len(sizes.heads) if norm == "sketch" else 0
    elif norm == "sketch":
        balancer += sizes.backbone * engine.gradient_bytes + 2 * 4 * sketch
    elif norm == "delayed":
        balancer += 2 * 4 * sketch * len(sizes.heads)
    memory = {"weights": weights, "gradients": _gradients(engine, sizes, gpus, local)}
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
    """Return the largest number of elements of weights that ZeRO-3 has gathered at one time."""
    if _stays_gathered(engine, sizes, norm):
        return sizes.trained + sizes.frozen
    return min(engine.prefetched + engine.retained, sizes.largest_forward)


def _stays_gathered(engine: Engine, sizes: Sizes, norm: str) -> bool:
    """Return whether ZeRO-3 gathers the weights only once per step."""
    traced = engine.stage == 3 and engine.task_traces and norm != "plain"
    return traced and sizes.trained + sizes.frozen <= engine.retained


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


def _gathers(passes: Passes, retained: int) -> int:
    """Return the elements of weights that ZeRO-3 gathers in one micro-step; a backward releases what it used."""
    first, *others = passes.backwards
    return passes.forward + max(first - retained, 0) + sum(others)


def moved_parts(
    engine: Engine, sizes: Sizes, gpus: int, norm: str, sketch: int, groups: TaskGroups | None = None
) -> dict[str, int]:
    """Return the bytes that one GPU sends in an optimizer step, by purpose.

    In a ring of R ranks a reduce-scatter or an all-gather sends (R - 1) / R of the elements, an all-reduce twice that.

    Args:
        engine: settings of the engine.
        sizes: sizes of the model.
        gpus: number of ranks R.
        norm: "exact", "sketch", "delayed" or "features"; "plain" is DeepSpeed's accumulation of the same micro-steps
            without a balancer.
        sketch: elements of a sketch.
        groups: ranks of each task; None: every rank runs every task. The result is that of the GPU that sends most.
    """
    sent = (gpus - 1) / gpus
    w, P = engine.weight_bytes, sizes.trained
    of_task = {name: sizes.backbone + head for name, head in sizes.heads.items()}
    every = [(passes, elements) for passes in sizes.passes for elements in passes.backwards]
    if groups or norm in ("sketch", "delayed") or (norm in ("plain", "features") and engine.stage < 2):
        reduced = P  # once per step
    elif engine.stage == 0 or engine.wraps_bf16:  # DeepSpeed reduces zeros for the other heads
        reduced = P * sum(passes.micro_steps if passes.joint else 1 for passes, _ in every)
    else:
        reduced = sum(n * (p.micro_steps if p.joint or engine.stage > 1 else 1) for p, n in every)
    factor = 2 if engine.stage == 0 or engine.wraps_bf16 or engine.all_reduces else 1
    moved = {"gradients": round(sent * factor * reduced * w)}
    if engine.stage in (1, 2):
        moved["new weights"] = round(sent * P * w)
    if _stays_gathered(engine, sizes, norm):
        moved["weights"] = round(sent * (P + sizes.frozen) * w)
    elif engine.stage == 3:  # for the forward of every micro-step, and what was released again for its backwards
        gathered = sum(_gathers(passes, engine.retained) * passes.micro_steps for passes in sizes.passes)
        moved["weights"] = round(sent * gathered * w)
    message = {"plain": 0, "exact": 3 * 8}.get(norm, (2 * sketch + 1) * 4) * len(of_task)
    if norm == "features":  # the norm and the loss of each micro-step
        message = 2 * 8 * sum(sizes.micro_steps.values())
    moved["norms"] = round(sent * 2 * message)
    if groups and norm == "exact":  # a reduce-scatter in float32 within each task's group
        within = {task: (len(ranks) - 1) / len(ranks) * 4 * of_task[task] for task, ranks in groups.ranks.items()}
        moved["norms"] += round(max(sum(within[task] for task in groups.of(rank)) for rank in range(gpus)))
    return moved
