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

from allinone_ds.balance.assignment import TaskGroups, groups_for
from allinone_ds.balance.options import NORMS, combination_error
from allinone_ds.balance.sketch import default_size
from allinone_ds.data.sources import open_source
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.planning.activations import activation_bytes
from allinone_ds.planning.memory import memory_parts, moved_parts, sizes_of
from allinone_ds.run_config.arguments import check_trainer_keys
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.engine_settings import Engine, read_engine
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.strict import did_you_mean

CLASSES = 100
"""Classes of a task whose data cannot be read, and which the caller does not tell."""


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
    weighting, options = config.balancer.weighting(), config.balancer.options()
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
    averaged = trainer.get("ema_decay") is not None

    def parts(engine: Engine, norm: str, groups: TaskGroups | None = None) -> tuple[dict[str, int], dict[str, int]]:
        return memory_parts(engine, sizes, gpus, norm, moments, kept, size, averaged, groups)

    peak = max(activations.values())
    choices = []
    for stage in range(4):
        other = dataclasses.replace(engine, stage=stage, offload=engine.offload and stage > 0)
        for kind in NORMS:
            if combination_error(kind, "data", weighting, other.stage, other.keeps_local_gradients):
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
