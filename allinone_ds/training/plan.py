"""What a run needs of every GPU, before any is there: memory by part and bytes moved a step, from its configuration.

Nothing of the model's size is allocated. Weights, gradients, optimizer and balancer are counted from the number of
parameters; activations are the tensors that autograd keeps in a forward on fake tensors, which have shapes only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from allinone_ds.balance import TaskGroups, balancer_from_config, groups_for
from allinone_ds.balance.sketch import default_size
from allinone_ds.data.base import DataError
from allinone_ds.data.sources import open_source
from allinone_ds.models.model import AllInOneModel
from allinone_ds.strict import ConfigError, did_you_mean
from allinone_ds.training.activations import activation_bytes
from allinone_ds.training.arguments import check_trainer_keys
from allinone_ds.training.build import build_model
from allinone_ds.training.config import ModelFacts, RunConfig
from allinone_ds.training.plan_engine import Engine, read_engine

CLASSES = 100
"""Classes of a task whose data cannot be read, and which the caller does not tell."""
NORMS = ("exact", "sketch", "delayed")


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model that are trained, in elements.

    Attributes:
        backbone: of the shared backbone.
        heads: of each task's head.
        frozen: parameters that are not trained.
        micro_steps: of each task in a step.
    """

    backbone: int
    heads: Mapping[str, int]
    micro_steps: Mapping[str, int]
    frozen: int = 0

    @property
    def trained(self) -> int:
        return self.backbone + sum(self.heads.values())

    @property
    def largest_task(self) -> int:
        return self.backbone + max(self.heads.values())


@dataclass
class Plan:
    """Needs of one GPU of a run; all sizes in bytes.

    Attributes:
        gpus: N.
        stage: ZeRO stage.
        norm: how the balancer takes norms.
        parameters: trained elements by component, and "frozen".
        memory: on the GPU, by part.
        host: in the host's memory, for each GPU, by part.
        moved: sent by a GPU in one optimizer step, by purpose.
        activations: of each task in one micro-step; `memory` has the largest.
        choices: for every stage and norm {"stage", "norm", "memory", "moved"}, in all.
        notes: what was assumed.
    """

    gpus: int
    stage: int
    norm: str
    parameters: dict[str, int]
    memory: dict[str, int]
    host: dict[str, int]
    moved: dict[str, int]
    activations: dict[str, int]
    choices: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain numbers and lists, with totals."""
        totals = {"memory_total": sum(self.memory.values()), "moved_total": sum(self.moved.values())}
        return {**dataclasses.asdict(self), **totals}


def plan_run(config: RunConfig, gpus: int, classes: Mapping[str, int] | None = None) -> Plan:
    """Needs of a run on `gpus` GPUs; touches no GPU and allocates no weights.

    Args:
        config: the run.
        gpus: N, ranks of the job.
        classes: number of classes by task; of tasks left out the data is asked, or the source's `expect.classes`.

    Raises:
        ConfigError: a configuration that cannot be used.
    """
    for name in classes or {}:
        if name not in config.tasks:
            raise ConfigError(f"classes: the run has no task '{name}'; {did_you_mean(name, config.tasks)}")
    notes: list[str] = []
    trainer = check_trainer_keys(config.trainer)
    counts = {name: _class_count(config, name, classes or {}, notes) for name in config.tasks}
    with torch.device("meta"):
        names = {name: [str(k) for k in range(count)] for name, count in counts.items()}
        backbone = config.model.backbone.model_copy(update={"checkpoint": None})
        if config.model.backbone.checkpoint is not None:
            notes.append("sizes of the backbone come from model_type and config, not from its checkpoint")
        model = build_model(config, ModelFacts(backbone=backbone, classes=names))
    weighting, options = balancer_from_config(config.balancer)
    engine = read_engine(config.deepspeed, bool(trainer.get("bf16")), bool(trainer.get("fp16")))
    engine = dataclasses.replace(engine, task_traces=options.get("task_traces", True))
    sizes = sizes_of(model, {name: task.micro_steps for name, task in config.tasks.items()})
    checkpointing = bool(trainer.get("gradient_checkpointing") or trainer.get("activation_checkpointing"))
    dtype = torch.float32 if engine.weight_bytes == 4 else torch.bfloat16
    batches = {name: task.batch_size for name, task in config.tasks.items()}
    activations = activation_bytes(model, batches, dtype, checkpointing, notes)
    norm = options.get("norm", "exact")
    moments = _moments(str(trainer.get("optim", "adamw_torch")), notes)
    kept = 1 if weighting.streams else len(sizes.heads)
    size = options.get("sketch_size") or default_size(sizes.trained)
    groups = None
    if options.get("parallel") == "tasks":
        groups = groups_for("tasks", options.get("groups"), tuple(config.tasks), gpus)
        if engine.stage not in (1, 2) or engine.wraps_bf16:
            raise ConfigError("balancer.parallel = 'tasks' needs ZeRO-1 or ZeRO-2 (docs/task-parallel.md, Limits)")
    averaged = trainer.get("ema_decay") is not None

    def parts(engine: Engine, norm: str, groups: TaskGroups | None = None) -> tuple[dict[str, int], dict[str, int]]:
        return memory_parts(engine, sizes, gpus, norm, moments, kept, size, averaged, groups)

    peak = max(activations.values())
    choices = []
    for stage in range(4):
        other = dataclasses.replace(engine, stage=stage, offload=engine.offload and stage > 0)
        for kind in NORMS:
            if not _allowed(other, kind, weighting.streams):
                continue
            total = sum(parts(other, kind)[0].values()) + peak
            moved = sum(moved_parts(other, sizes, gpus, kind, size).values())
            choices.append({"stage": stage, "norm": kind, "memory": total, "moved": moved})
    memory, host = parts(engine, norm, groups)
    if trainer.get("async_save"):
        copied = ["optimizer", "average of the weights", *(["weights"] if engine.stage < 3 else [])]  # as rank 0 does
        host = {**host, "copy of a checkpoint": sum({**memory, **host}.get(part, 0) for part in copied)}
    return Plan(
        gpus=gpus,
        stage=engine.stage,
        norm=norm,
        parameters={
            "backbone": sizes.backbone,
            **{f"head {name}": count for name, count in sizes.heads.items()},
            "frozen": sizes.frozen,
        },
        memory={**memory, "activations": peak},
        host=host,
        moved=moved_parts(engine, sizes, gpus, norm, size, groups),
        activations=activations,
        choices=choices,
        notes=notes,
    )


def sizes_of(model: AllInOneModel, micro_steps: Mapping[str, int]) -> Sizes:
    """Elements of a model's parameters, wherever they are (the meta device too)."""

    def trained(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    return Sizes(
        backbone=trained(model.backbone),
        heads={name: trained(task) for name, task in model.tasks.items()},
        micro_steps=micro_steps,
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
    )


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
    """Bytes of one GPU, and of the host for each GPU, by part; without activations. P trained elements, N GPUs.

    Args:
        engine: see `Engine`.
        sizes: see `Sizes`.
        gpus: N.
        norm: "exact", "sketch" or "delayed".
        moments: tensors of P elements that the optimizer keeps in float32 beside its copy of the weights.
        kept: shards the balancer keeps with exact norms: 1, or T for weightings that see all tasks first.
        sketch: elements of a sketch.
        averaged: an average of the weights is kept (`ema_decay`).
        groups: which ranks run which task; None: every rank every task.
    """
    P = sizes.trained
    part = P if engine.stage == 0 else -(-P // gpus)
    whole_weights = P + sizes.frozen
    weights = engine.weight_bytes * (-(-whole_weights // gpus) if engine.stage == 3 else whole_weights)
    # the optimizer's fp32 copy is a copy even of fp32 weights, but for ZeRO-0
    copies = 0 if engine.stage == 0 and engine.weight_bytes == 4 else 1
    optimizer = 4 * part * (copies + moments)
    average = {"average of the weights": 4 * part} if averaged else {}
    balancer = 4 * part * (1 if norm == "sketch" or groups else kept)  # delayed: its first step is exact
    if groups:
        most = max(len(groups.of(rank)) for rank in range(gpus))
        balancer += (most - 1) * sizes.backbone * engine.gradient_bytes
        balancer += 2 * 4 * sketch * len(sizes.heads) if norm == "sketch" else 0
    elif norm == "sketch":
        balancer += sizes.backbone * engine.gradient_bytes + 2 * 4 * sketch
    elif norm == "delayed":
        balancer += 2 * 4 * sketch * len(sizes.heads)
    memory = {"weights": weights, "gradients": _gradients(engine, sizes, gpus, norm != "exact" or bool(groups))}
    buffers = engine.bucket * engine.buckets * engine.weight_bytes if engine.stage in (2, 3) else 0
    buffers += engine.weight_bytes * _gathered(engine, sizes, norm)
    if (norm != "exact" or groups) and engine.fp32_accumulation:  # where local gradients are reduced to
        buffers += 4 * part
    beside = {"optimizer": optimizer, "balancer": balancer, **average}
    if engine.offload:
        return {**memory, "buffers": buffers}, beside
    return {**memory, **beside, "buffers": buffers}, {}


def _gathered(engine: Engine, sizes: Sizes, norm: str) -> int:
    """Elements of weights that ZeRO-3 holds gathered at most."""
    if _stays_gathered(engine, sizes, norm):
        return sizes.trained + sizes.frozen
    return min(engine.prefetched + engine.retained, sizes.largest_task)


def _stays_gathered(engine: Engine, sizes: Sizes, norm: str) -> bool:
    """Whether ZeRO-3 gathers weights once a step."""
    traced = engine.stage == 3 and engine.task_traces and norm != "plain"
    return traced and sizes.trained + sizes.frozen <= engine.retained


def _gradients(engine: Engine, sizes: Sizes, gpus: int, local: bool) -> int:
    P, part = sizes.trained, -(-sizes.trained // gpus)
    shard = part * engine.gradient_bytes
    if engine.wraps_bf16:  # the whole gradient in both dtypes
        return P * 4 + sizes.largest_task * engine.weight_bytes
    if local:  # whole, on every rank, and the buffer that ZeRO-3 always has
        return P * engine.weight_bytes + (shard if engine.stage == 3 else 0)
    if engine.stage == 0:
        return P * engine.weight_bytes
    if engine.stage == 1:  # local until the task's last micro-step
        return sizes.largest_task * engine.gradient_bytes + (shard if engine.fp32_accumulation else 0)
    return shard


def moved_parts(
    engine: Engine, sizes: Sizes, gpus: int, norm: str, sketch: int, groups: TaskGroups | None = None
) -> dict[str, int]:
    """Bytes that one GPU sends in an optimizer step, by purpose.

    A ring's figures: (N - 1) / N of the elements for a reduce-scatter or an all-gather, twice that for an all-reduce.

    Args:
        engine: see `Engine`.
        sizes: see `Sizes`.
        gpus: N.
        norm: "exact", "sketch" or "delayed"; "plain" is DeepSpeed's accumulation of the same micro-steps, unbalanced.
        sketch: elements of a sketch.
        groups: which ranks run which task; None: every rank every task. Of GPUs that send differently, the most.
    """
    share = (gpus - 1) / gpus
    w, P = engine.weight_bytes, sizes.trained
    of_task = {name: sizes.backbone + head for name, head in sizes.heads.items()}
    reduced_each = sum(of_task[name] * sizes.micro_steps[name] for name in of_task)
    if groups or norm in ("sketch", "delayed") or (norm == "plain" and engine.stage < 2):
        reduced = P  # once
    elif engine.stage == 0 or engine.wraps_bf16:  # DeepSpeed fills in zeros for the other heads
        reduced = P * len(of_task)
    elif engine.stage == 1:
        reduced = sum(of_task.values())
    else:
        reduced = reduced_each
    factor = 2 if engine.stage == 0 or engine.wraps_bf16 or engine.all_reduces else 1
    moved = {"gradients": round(share * factor * reduced * w)}
    if engine.stage in (1, 2):
        moved["new weights"] = round(share * P * w)
    if _stays_gathered(engine, sizes, norm):
        moved["weights"] = round(share * (P + sizes.frozen) * w)
    elif engine.stage == 3:  # for the forward of every micro-step, and again for its backward what was let go
        again = sum(max(of_task[name] - engine.retained, 0) * sizes.micro_steps[name] for name in of_task)
        moved["weights"] = round(share * (reduced_each + again) * w)
    message = {"plain": 0, "exact": 3 * 8}.get(norm, (2 * sketch + 1) * 4)
    moved["norms"] = round(share * 2 * message * len(of_task))
    if groups and norm == "exact":  # a reduce-scatter in float32 within each task's group
        within = {task: (len(ranks) - 1) / len(ranks) * 4 * of_task[task] for task, ranks in groups.ranks.items()}
        moved["norms"] += round(max(sum(within[task] for task in groups.of(rank)) for rank in range(gpus)))
    return moved


def _class_count(config: RunConfig, name: str, given: Mapping[str, int], notes: list[str]) -> int:
    if name in given:
        return given[name]
    source = config.tasks[name].train
    try:
        return len(open_source(source, config.data_root).classes)
    except DataError:
        if source.expect is not None and source.expect.classes is not None:
            return source.expect.classes
        notes.append(f"{name}: its data cannot be read, {CLASSES} classes assumed")
        return CLASSES


def _moments(optim: str, notes: list[str]) -> int:
    if optim == "sgd":
        return 0
    if not optim.startswith("adamw"):
        notes.append(f"optim '{optim}': counted like AdamW, with two moments of every weight")
    return 2


def _allowed(engine: Engine, norm: str, streams: bool) -> bool:
    """Whether the balancer serves the combination: local gradients need ZeRO and no BF16_Optimizer."""
    if norm == "exact":
        return True
    return engine.stage > 0 and not engine.wraps_bf16 and (norm == "delayed" or streams)
