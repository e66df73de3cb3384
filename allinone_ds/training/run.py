"""Train one run: build model and data, train, evaluate, save, and write plots and report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from allinone_ds.atomic_file import write_atomically
from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.distributed import barrier
from allinone_ds.reporting.pictures import collect_drawings, save_pictures, worst_images
from allinone_ds.reporting.plots import write_plots
from allinone_ds.reporting.report import write_predictions_page, write_report
from allinone_ds.run_config.arguments import AllInOneArguments, arguments_from_config
from allinone_ds.run_config.build import (
    build_model,
    classes_of,
    inspect_data,
    open_test_data,
    open_train_data,
    without_checkpoint,
)
from allinone_ds.run_config.length import steps_of_epochs
from allinone_ds.run_config.run_files import ModelFacts, RunFiles
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.checkpoints import check_resume, parse_resume, step_of
from allinone_ds.run_folder.collective import lock_run
from allinone_ds.run_folder.disk import explained_disk_errors
from allinone_ds.run_folder.names import AVERAGED, DETAILS, METRICS_FILE, PLOTS, WORST_PICTURES
from allinone_ds.run_folder.new_folder import missing_folders, remove_failed_start
from allinone_ds.training.start.arguments import require_launcher
from allinone_ds.training.start.callbacks import configured_callbacks
from allinone_ds.training.trainer import AllInOneTrainer
from allinone_ds.training.warm_start import start_from

_MAX_WARNINGS = 3
"""Warnings per data set at the start of a run; `allinone-ds check` lists all."""


def train_run(config: RunConfig) -> dict[str, float] | None:
    """Train and evaluate a run, and write its folder. Collective.

    The folder receives checkpoints, the final weights (model.safetensors), config.yaml, model.json, metrics.json,
    plots/, predictions.html and report.html. With `ema_decay` it also holds ema/, which has the form of a run's folder
    and holds the averaged weights.

    Args:
        config: configuration of the run; `trainer.resume_from_checkpoint` is true (resume from the last checkpoint) or
            the folder of a checkpoint.

    Returns:
        The final metrics; None if SIGTERM or SIGUSR1 ended training after a checkpoint.

    Raises:
        ConfigError: the folder holds checkpoints that are not to be resumed, holds none to resume, is in use by a
            different run, or cannot be written to.
        DataError: the data is invalid.
        RunError: the run cannot continue.
    """
    require_launcher()
    args = arguments_from_config(config)  # before the model: ZeRO-3 partitions the model while it is built
    resume_from = parse_resume(config.trainer.get("resume_from_checkpoint"))
    callbacks = configured_callbacks(config)
    check_resume(resume_from, config.run_dir)
    made = missing_folders(config.run_dir) if args.process_index == 0 else []
    lock_run(config.run_dir)
    try:
        with explained_disk_errors(config.run_dir):
            return _train(config, args, resume_from, callbacks)
    except BaseException:
        remove_failed_start(made)
        raise


def _train(
    config: RunConfig, args: AllInOneArguments, resume_from: bool | Path, callbacks: list[TrainerCallback]
) -> dict[str, float] | None:
    set_seed(args.seed)
    train_data = open_train_data(config)
    sizes = {name: len(data.dataset) for name, data in train_data.items()}
    seed = args.seed if args.data_seed is None else args.data_seed
    args.max_steps = steps_of_epochs(config, sizes, args.world_size, seed) or args.max_steps
    classes = classes_of(train_data)
    test_data = open_test_data(config, classes)
    if not resume_from:
        inspect_data(config, train_data, test_data)
    model = build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes))
    source = None if resume_from else config.model.start_from
    untrained = [] if source is None else start_from(model, source)
    facts = ModelFacts(backbone=without_checkpoint(config.model.backbone, model.backbone.config), classes=classes)
    weighting, balancer_options = config.balancer.weighting(), config.balancer.options()
    trainer = AllInOneTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=test_data,
        weighting=weighting,
        balancer_options=balancer_options,
        callbacks=[RunFiles(config, facts), *callbacks],
        sampling=config.sampling,
        continues={name: task.continues for name, task in config.tasks.items() if task.continues is not None},
    )
    if not resume_from:
        _warn_at_start(trainer, {**train_data, **{f"{name} test": data for name, data in test_data.items()}}, untrained)
    result = trainer.train(resume_from_checkpoint=resume_from)
    return finish_run(trainer, result.metrics)


def finish_run(trainer: AllInOneTrainer, training: Mapping[str, float] | None = None) -> dict[str, float] | None:
    """Write what the folder of a trained run holds beside its checkpoints, and evaluate it. Collective.

    Args:
        trainer: the trainer, after `train`.
        training: the metrics that `train` returned, for metrics.json.

    Returns:
        The final metrics; None if SIGTERM or SIGUSR1 ended training after a checkpoint.

    Example::

        result = trainer.train()
        finish_run(trainer, result.metrics)["eval_score"]
    """
    with explained_disk_errors(Path(str(trainer.args.output_dir))):
        return _finish(trainer, training)


def _finish(trainer: AllInOneTrainer, training: Mapping[str, float] | None) -> dict[str, float] | None:
    args, test_data = trainer.args, trainer.test_data
    details: Mapping[str, Any] = {}
    if trainer.stop_signal.caught:
        if trainer.is_world_process_zero():
            trainer.events.write("stopped", step=trainer.state.global_step, signal=trainer.stop_signal.caught)
        return None
    trainer.save_model()
    metrics = {**(training or {}), "steps": trainer.state.global_step, "world_size": args.world_size}
    if test_data:
        evaluated, details = _last_evaluation(trainer)
        metrics.update(evaluated)
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            metrics["best_step"] = step_of(trainer.state.best_model_checkpoint)
        draws = trainer.is_world_process_zero()
        drawings = collect_drawings(trainer.deepspeed, test_data, args.device, 12, draws)
        worst = collect_drawings(trainer.deepspeed, test_data, args.device, 12, draws, worst_images(details))
    if args.ema_decay is not None:
        metrics.update(_save_averaged(trainer, metrics))
    if trainer.is_world_process_zero():
        folder = Path(str(args.output_dir))
        if trainer.run_files is not None:
            trainer.run_files.on_checkpoint(folder)
        _write_metrics(folder, metrics, details)
        write_plots(trainer.state.log_history, folder / PLOTS)
        if test_data:
            save_pictures(drawings, folder)
            save_pictures(worst, folder, WORST_PICTURES)
            write_predictions_page(folder)
        write_report([folder])
    barrier()
    return metrics


def _save_averaged(trainer: AllInOneTrainer, metrics: Mapping[str, float]) -> dict[str, float]:
    """Write the folder of the averaged weights; return their metrics, named eval_ema_TASK_METRIC. Collective."""
    folder = Path(str(trainer.args.output_dir)) / AVERAGED
    with trainer.averaged_weights():
        trainer.save_model(str(folder))
        averaged = trainer.evaluate(metric_key_prefix="eval_ema") if trainer.test_data else {}
        details = trainer.details.get(("eval_ema", trainer.state.global_step), {})
    if trainer.is_world_process_zero():
        if trainer.run_files is not None:
            trainer.run_files.on_checkpoint(folder)
        renamed = {key.replace("eval_ema_", "eval_"): value for key, value in averaged.items()}
        _write_metrics(folder, renamed | {key: metrics[key] for key in ("steps", "world_size")}, details)
    return averaged


def _write_metrics(folder: Path, metrics: Mapping[str, float], details: Mapping[str, Any]) -> None:
    content = {**metrics, DETAILS: details} if details else metrics
    write_atomically(folder / METRICS_FILE, json.dumps(content, indent=2) + "\n")


def _warn_at_start(trainer: AllInOneTrainer, data: Mapping[str, TaskData], untrained: list[str]) -> None:
    """Warn of heads that `start_from` did not copy, and of problems that were found when the data was opened."""
    if untrained:
        trainer.warn(
            0,
            f"model.start_from: the heads of {', '.join(untrained)} start from random weights: the earlier run has no "
            "such task, or its classes or sizes differ",
        )
    problems = [str(problem) for part in data.values() for problem in part.dataset.structural[:_MAX_WARNINGS]]
    for message in dict.fromkeys(problems):  # several tasks may read one data set
        trainer.warn(0, message)


def _last_evaluation(trainer: AllInOneTrainer) -> tuple[dict[str, float], Mapping[str, Any]]:
    """Return metrics and details of the current weights, which are evaluated if training did not do it. Collective."""
    state = trainer.state
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    # not `state.best_global_step`: that step may have been evaluated without saving a checkpoint
    step = step_of(str(state.best_model_checkpoint)) if best else state.global_step
    details = trainer.details.get(("eval", step))  # not known if the evaluation was before a resume
    for entry in reversed(state.log_history):
        if entry.get("step") == step and "eval_score" in entry and details is not None:
            return {key: value for key, value in entry.items() if key.startswith("eval_")}, details
    metrics = trainer.evaluate()
    return metrics, trainer.details.get(("eval", state.global_step), {})
