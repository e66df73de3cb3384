"""Memory per GPU and bytes sent per optimizer step, computed from a run's configuration without a GPU.

No weights are allocated. Weights, gradients, optimizer and balancer are counted from the number of parameters.
Activations are the tensors that autograd keeps in a forward on fake tensors, which have shapes but no storage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from allinone_ds.balance.assignment import TaskGroups, groups_for
from allinone_ds.balance.combiners.sketch import default_size
from allinone_ds.balance.options import NORMS, combination_error
from allinone_ds.data.joint.dataset import JointDataset
from allinone_ds.data.loading.sampling import TaskSampling
from allinone_ds.data.sources import open_source
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.model import AllInOneModel
from allinone_ds.planning.activations import activation_bytes
from allinone_ds.planning.memory import JointTasks, kept_shards, memory_parts, sizes_of
from allinone_ds.planning.savings import Saving, traffic_savings
from allinone_ds.planning.traffic import between_nodes, moved_parts
from allinone_ds.run_config.arguments import check_trainer_keys
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.engine_settings import Engine, read_engine
from allinone_ds.run_config.optimizer_settings import MUON, fits_muon
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig, check_balancer
from allinone_ds.run_config.task_config import JointConfig
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks import task_class

DEFAULT_CLASSES = 100
"""Number of classes of a task whose data cannot be read and for which no number is given."""
GPU_MEMORY = 80 * 2**30
"""Bytes of a GPU's memory, where no other number is given."""
_SAMPLED_STEPS = 1000
"""Steps over which sampled tasks are averaged, where the run does not say how many it takes."""
PER_NODE = 8
"""GPUs of a node, where no other number is given."""


@dataclass
class Plan:
    """Memory and traffic of one GPU of a run, in bytes.

    Attributes:
        gpus: number of ranks R.
        stage: ZeRO stage.
        norm: "exact", "sketch", "delayed" or "features".
        parameters: component -> trained elements, what heads share as a component of its own; and "frozen", elements
            that are not trained.
        memory: part -> bytes on the GPU.
        host: part -> bytes in the host's memory per GPU.
        moved: purpose -> bytes sent in one optimizer step.
        activations: task or joint group -> bytes in one micro-step; the largest of them is in `memory`.
        between: bytes of `moved` that all GPUs of a node together send to other nodes.
        choices: one {"stage", "norm", "memory", "moved", "between"} per stage and norm that the weighting allows, in
            total bytes.
        savings: of ZeRO-3: keys under which less is sent, the first row without any.
        notes: assumptions of the plan.
    """

    gpus: int
    stage: int
    norm: str
    parameters: dict[str, int]
    memory: dict[str, int]
    host: dict[str, int]
    moved: dict[str, int]
    between: int
    activations: dict[str, int]
    choices: list[dict[str, Any]]
    savings: list[Saving]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as numbers and lists, with totals."""
        totals = {"memory_total": sum(self.memory.values()), "moved_total": sum(self.moved.values())}
        return {**dataclasses.asdict(self), **totals}


def plan_run(
    config: RunConfig,
    gpus: int,
    classes: Mapping[str, int] | None = None,
    per_node: int = PER_NODE,
    gpu_memory: int = GPU_MEMORY,
) -> Plan:
    """Compute memory and traffic of a run without a GPU and without its weights.

    Args:
        config: the run's configuration.
        gpus: number of ranks R.
        classes: task -> number of classes. For other tasks it is read from the data, or from the source's
            `expect.classes` if the data cannot be read.
        per_node: GPUs of a node.
        gpu_memory: bytes of a GPU's memory, within which settings are recommended.

    Raises:
        ConfigError: the configuration cannot run, or not on so many ranks, or `classes` names an unknown task.

    Example::

        plan = plan_run(load_config("configs/runs/demo.yaml"), gpus=8, classes={"detection": 45})
        sum(plan.memory.values()) / 2**30    # GiB per GPU
    """
    for name in classes or {}:
        if name not in config.tasks:
            raise ConfigError(f"classes.{name}: the run has no such task; {did_you_mean(name, config.tasks)}")
    notes: list[str] = []
    trainer = check_trainer_keys(config.trainer)
    check_balancer(config)
    balancer, weighting = config.balancer, config.balancer.weighting()
    half = bool(trainer.get("bf16")), bool(trainer.get("fp16"))
    deepspeed: Any = config.deepspeed
    engine = read_engine(deepspeed, *half)
    engine = dataclasses.replace(engine, task_traces=balancer.task_traces)
    if gpus % min(engine.copied_within, gpus):
        raise ConfigError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size = {engine.copied_within}: {gpus} GPUs cannot be "
            "divided into groups of so many; choose a divisor, such as the number of GPUs of a node"
        )
    if gpus > engine.copied_within > per_node:
        notes.append(f"zero_hpz_partition_size = {engine.copied_within} is more than the {per_node} GPUs of a node")
    counts = _class_counts(config, classes or {}, notes)
    with torch.device("meta"):
        names = {name: [str(k) for k in range(count)] for name, count in counts.items()}
        backbone = config.model.backbone.model_copy(update={"checkpoint": None})
        if config.model.backbone.checkpoint is not None:
            notes.append("sizes of the backbone come from model_type and config, not from its checkpoint")
        model = build_model(config, ModelFacts(backbone=backbone, classes=names))
    groups_of_tasks = [JointTasks(group.tasks, group.at) for group in config.joint.values()]
    micro_steps = {name: task.micro_steps for name, task in config.tasks.items()}
    sizes = sizes_of(model, micro_steps, groups_of_tasks, _chances(config, notes))
    checkpointing = bool(trainer.get("gradient_checkpointing") or trainer.get("activation_checkpointing"))
    dtype = torch.float32 if engine.weight_bytes == 4 else torch.bfloat16
    batches = {name: task.batch_size for name, task in config.tasks.items()}
    joint = {name: group.tasks for name, group in config.joint.items()}
    options = trainer.get("activation_checkpointing_kwargs") or trainer.get("gradient_checkpointing_kwargs") or {}
    every, offload = int(options.get("every_n_layers", 1)), bool(options.get("offload"))
    activations = activation_bytes(model, batches, dtype, checkpointing, notes, joint, every, offload)
    if checkpointing and offload:
        notes.append("activation_checkpointing_kwargs: the inputs that offload keeps in host memory are not counted")
    if config.model.thaw:
        notes.append(
            "model.thaw: memory and traffic are those after the last thaw; what is frozen until then has gradient "
            "shards and float32 weights from the start, and the optimizer's moments only once it is thawed"
        )
    if trainer.get("optim") == MUON and engine.stage == 3:
        engine = dataclasses.replace(engine, all_reduces=True)
        notes.append(
            "Muon on ZeRO-3: gradients are all-reduced; those of its matrices, which its step gathers again, are not "
            "counted"
        )
    moments = _moments(str(trainer.get("optim", "auto")), model, notes)
    shards = kept_shards(weighting, sizes)
    size = balancer.sketch_size or default_size(sizes.trained)
    groups = None
    if balancer.parallel == "tasks":
        groups = groups_for("tasks", balancer.groups, tuple(config.tasks), gpus)
    averaged = trainer.get("ema_decay") is not None

    def parts(engine: Engine, norm: str, groups: TaskGroups | None = None) -> tuple[dict[str, int], dict[str, int]]:
        return memory_parts(engine, sizes, gpus, norm, moments, shards, size, averaged, groups)

    peak = max(activations.values())
    choices = []
    for stage in range(4):
        zero = {**deepspeed.get("zero_optimization", {}), "stage": stage}
        other = read_engine({**deepspeed, "zero_optimization": zero}, *half)
        other = dataclasses.replace(other, task_traces=balancer.task_traces, offload=engine.offload and stage > 0)
        for kind in NORMS:
            if combination_error(kind, "data", weighting, other.stage, other.keeps_local_gradients):
                continue
            total = sum(parts(other, kind)[0].values()) + peak
            moved = moved_parts(other, sizes, gpus, kind, size)
            between = between_nodes(moved, gpus, per_node, other.copied_within)
            sent = {"moved": sum(moved.values()), "between": between}
            choices.append({"stage": stage, "norm": kind, "memory": total, **sent})
    memory, host = parts(engine, balancer.norm, groups)
    if trainer.get("async_save"):
        copied = sum({**memory, **host}.get(part, 0) for part in ("optimizer", "average of the weights"))
        frozen = sizes.frozen if trainer.get("save_frozen", True) else 0
        # rank 0 copies whole weights, but on ZeRO-3, where each rank copies its shard of those that are frozen
        elements = sizes.trained + frozen if engine.stage < 3 else -(-frozen // gpus)
        host = {**host, "copy of a checkpoint": copied + engine.weight_bytes * elements}
    moved = moved_parts(engine, sizes, gpus, balancer.norm, size, groups)

    def cost(changed: Engine) -> tuple[int, dict[str, int]]:
        memory = parts(changed, balancer.norm, groups)[0]
        return sum(memory.values()) + peak, moved_parts(changed, sizes, gpus, balancer.norm, size, groups)

    return Plan(
        gpus=gpus,
        stage=engine.stage,
        norm=balancer.norm,
        parameters={
            "backbone": sizes.backbone,
            **{f"head {name}": count for name, count in sizes.heads.items()},
            **{f"heads {' and '.join(tasks)}": count for tasks, count in sizes.tied.items()},
            "frozen": sizes.frozen,
        },
        memory={**memory, "activations": peak},
        host=host,
        moved=moved,
        between=between_nodes(moved, gpus, per_node, engine.copied_within),
        activations=activations,
        choices=choices,
        savings=traffic_savings(engine, sizes, balancer.norm, gpus, per_node, gpu_memory, cost),
        notes=notes,
    )


def _class_counts(config: RunConfig, given: Mapping[str, int], notes: list[str]) -> dict[str, int]:
    """Return the number of classes of each task: as given, from its data, as expected, or DEFAULT_CLASSES."""
    counts = {name: given.get(name, 0) for name in config.tasks}
    for name, images in config.images.items():
        tasks = images.tasks if isinstance(images, JointConfig) else [name]
        wanted = [task for task in tasks if task_class(config.tasks[task].type).has_classes and task not in given]
        if not wanted:
            continue
        source = images.train_source
        try:
            dataset = open_source(source, config.data_root)
        except DataError:
            for task in wanted:
                named = config.tasks[task].classes if isinstance(images, JointConfig) else None
                expected = source.expect.classes if source.expect is not None else None
                counts[task] = len(named) if isinstance(named, list) else expected or DEFAULT_CLASSES
                if not isinstance(named, list) and expected is None:
                    notes.append(f"{task}: its data cannot be read, {DEFAULT_CLASSES} classes are assumed")
        else:
            found = dataset.classes_of if isinstance(dataset, JointDataset) else {name: dataset.classes}
            counts |= {task: len(found[task]) for task in wanted}
    return counts


def _chances(config: RunConfig, notes: list[str]) -> dict[str, float]:
    """Return the share of the steps that run each task; empty where every step runs all."""
    if config.sampling is None:
        return {}
    samples = dict.fromkeys(config.images, 1)
    if config.sampling.weights == "size":
        for name, images in config.images.items():
            try:
                samples[name] = len(open_source(images.train_source, config.data_root))
            except DataError:
                notes.append(f"sampling.weights = 'size': the data of {name} cannot be read, one sample is assumed")
    steps = int(config.trainer.get("max_steps") or _SAMPLED_STEPS)
    sampling = TaskSampling(config.sampling, samples, int(config.trainer.get("seed", 0)))
    shares = {name: sampling.runs(name, steps) / steps for name in samples}
    notes.append(
        f"sampling: bytes sent are those of an average step, which runs {sum(shares.values()):.3g} of {len(shares)} "
        "tasks and joint groups"
    )
    of_group = {task: shares[name] for name, group in config.joint.items() for task in group.tasks}
    return {name: of_group.get(name, shares.get(name, 1.0)) for name in config.tasks}


def _moments(optim: str, model: AllInOneModel, notes: list[str]) -> float:
    """Return the number of values that the optimizer keeps per trained element, in addition to the weight."""
    if optim == "sgd":
        return 0
    if optim == MUON:  # momentum alone, for the matrices of the backbone's layers; the others have AdamW
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = sum(p.numel() for name, p in named if name.startswith("backbone.") and fits_muon(name, p.shape))
        return 2 - matrices / sum(p.numel() for _, p in named)
    if optim != "auto" and not optim.startswith("adamw"):
        notes.append(f"optim '{optim}' is counted like AdamW, with two moments per weight")
    return 2
