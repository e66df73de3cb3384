"""A run from its configuration to its folder: build, train, evaluate, save, draw."""

from __future__ import annotations

import json

import torch
from transformers import PreTrainedConfig, set_seed

from allinone_ds.balance import weighting_from_config
from allinone_ds.data.loader import TaskData
from allinone_ds.data.sources import open_source
from allinone_ds.data.transforms import eval_transform, train_transform
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.models.model import AllInOneModel
from allinone_ds.tasks import build_task, task_class
from allinone_ds.training.arguments import arguments_from_config
from allinone_ds.training.config import ModelFacts, RunConfig, save_run_files
from allinone_ds.training.folder import METRICS_FILE, PLOTS, checkpoint_to_resume
from allinone_ds.training.pages import collect_drawings, write_page
from allinone_ds.training.plots import write_plots
from allinone_ds.training.progress import EventLog, PrintProgress, RunFiles
from allinone_ds.training.trainer import AllInOneTrainer


def build_model(config: RunConfig, facts: ModelFacts) -> AllInOneModel:
    """The model of a run with fresh weights (or those of the backbone's checkpoint).

    Args:
        config: the run; only its tasks are read.
        facts: the backbone and the class names.
    """
    backbone = build_backbone(facts.backbone)
    tasks = {
        name: build_task(task.type, name, facts.classes[name], backbone, task.image_size, task.head, task.options)
        for name, task in config.tasks.items()
    }
    return AllInOneModel(backbone, tasks)


def open_train_data(config: RunConfig) -> dict[str, TaskData]:
    """Training data by task.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    data = {}
    for name, task in config.tasks.items():
        data[name] = TaskData(
            dataset=open_source(task.train, config.data_root),
            transform=train_transform(task.augment, task.image_size),
            collate=task_class(task.type).collate,
            batch_size=task.batch_size,
            micro_steps=task.micro_steps,
            cache=task.cache,
        )
    return data


def open_test_data(config: RunConfig, classes: dict[str, list[str]]) -> dict[str, TaskData]:
    """Test data of the tasks that have any, their class ids those of the training data.

    Args:
        config: the run.
        classes: class names of the training data by task.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    data = {}
    for name, task in config.tasks.items():
        if task.test is not None:
            data[name] = TaskData(
                dataset=open_source(task.test, config.data_root, classes=classes[name]),
                transform=eval_transform(task.image_size),
                collate=task_class(task.type).collate,
                batch_size=task.eval_batch_size or task.batch_size,
                cache=task.cache,
            )
    return data


def train_run(config: RunConfig) -> dict[str, float]:
    """Train, evaluate and write the run's folder; every rank calls it.

    The folder gets checkpoints, the weights alone (model.safetensors), config.yaml, model.json, metrics.json, plots/
    and predictions.html.

    Args:
        config: the run; `trainer.resume_from_checkpoint` is true (the last checkpoint) or a checkpoint's folder.

    Returns:
        The final metrics.

    Raises:
        ConfigError: the folder holds another run's checkpoints, or there is none to resume from.
        DataError: the data cannot be trained on.
    """
    args = arguments_from_config(config)  # before the model: ZeRO-3 partitions it while it is built
    resume = checkpoint_to_resume(config.trainer.get("resume_from_checkpoint"), config.run_dir)
    set_seed(args.seed)
    train_data = open_train_data(config)
    classes = {name: list(data.dataset.classes) for name, data in train_data.items()}
    test_data = open_test_data(config, classes)
    model = build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes))
    facts = ModelFacts(backbone=_spelled_out(config.model.backbone, model.backbone.config), classes=classes)
    trainer = AllInOneTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=test_data,
        weighting=weighting_from_config(config.balancer),
        callbacks=[RunFiles(config, facts), EventLog(config.run_dir), PrintProgress()],
    )
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    metrics = {**result.metrics, "steps": trainer.state.global_step, "world_size": args.world_size}
    if test_data:
        metrics.update(trainer.evaluate())
        if trainer.state.best_model_checkpoint:
            metrics["best_step"] = trainer.state.best_global_step
        drawings = collect_drawings(trainer.deepspeed, test_data, args.device, 12, draw=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        folder = config.run_dir
        save_run_files(config, facts, folder)
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")
        write_plots(trainer.state.log_history, folder / PLOTS)
        if test_data:
            write_page(drawings, folder, title=config.name, metrics=metrics)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return metrics


def _spelled_out(asked: BackboneConfig, built: PreTrainedConfig) -> BackboneConfig:
    """The backbone's configuration without its checkpoint: the sizes found there are written down instead."""
    if asked.checkpoint is None:
        return asked
    default = type(built)().to_dict()
    apart = (
        "out_indices",
        "out_features",
        "stage_names",
        "dtype",
        "architectures",
        "transformers_version",
        "model_type",
    )
    sizes = {
        key: value
        for key, value in built.to_dict().items()
        if not key.startswith("_") and key not in apart and key in default and value != default[key]
    }
    return asked.model_copy(update={"checkpoint": None, "config": sizes, "out_indices": list(built.out_indices)})
