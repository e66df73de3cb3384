"""A run from its configuration to its folder: build, train, evaluate, save, draw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from allinone_ds.balance.options import balancer_from_config
from allinone_ds.data.loader import TaskData
from allinone_ds.distributed import barrier
from allinone_ds.reporting.pictures import collect_drawings, save_pictures
from allinone_ds.reporting.plots import write_plots
from allinone_ds.reporting.progress import PrintProgress
from allinone_ds.reporting.report import write_predictions_page, write_report
from allinone_ds.run_config.arguments import arguments_from_config
from allinone_ds.run_config.build import build_model, open_test_data, open_train_data, spelled_out
from allinone_ds.run_config.run_files import ModelFacts, RunFiles, save_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.atomic_checkpoint import claim_run
from allinone_ds.run_folder.checkpoints import check_resume
from allinone_ds.run_folder.event_log import EventLog
from allinone_ds.run_folder.names import AVERAGED, METRICS_FILE, PLOTS
from allinone_ds.training.trainer import AllInOneTrainer
from allinone_ds.training.warm_start import start_from

_TOLD = 3  # warnings about one data set; `allinone-ds check` lists all


def train_run(config: RunConfig) -> dict[str, float] | None:
    """Train, evaluate and write the run's folder; every rank calls it.

    The folder gets checkpoints, the weights alone (model.safetensors), config.yaml, model.json, metrics.json, plots/,
    predictions.html and report.html; with `ema_decay` also ema/, a run's folder whose weights are the averaged ones.

    Args:
        config: the run; `trainer.resume_from_checkpoint` is true (the last checkpoint) or a checkpoint's folder.

    Returns:
        The final metrics; None when SIGTERM or SIGUSR1 ended training after a checkpoint.

    Raises:
        ConfigError: the folder holds another run's checkpoints, a run is writing to it, nothing can be written to it,
            or there is none to resume from.
        RunError: the run cannot go on.
        DataError: the data cannot be trained on.
    """
    args = arguments_from_config(config)  # before the model: ZeRO-3 partitions it while it is built
    resume = config.trainer.get("resume_from_checkpoint")
    if str(resume).lower() == "false":
        resume = None
    check_resume(resume, config.run_dir)
    claim_run(config.run_dir)
    set_seed(args.seed)
    train_data = open_train_data(config)
    classes = {name: list(data.dataset.classes) for name, data in train_data.items()}
    test_data = open_test_data(config, classes)
    model = build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes))
    fresh = start_from(model, config.model.start_from) if config.model.start_from is not None and resume is None else []
    facts = ModelFacts(backbone=spelled_out(config.model.backbone, model.backbone.config), classes=classes)
    weighting, balancer_options = balancer_from_config(config.balancer)
    events = EventLog(config.run_dir)
    trainer = AllInOneTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=test_data,
        weighting=weighting,
        balancer_options=balancer_options,
        callbacks=[RunFiles(config, facts), events, PrintProgress()],
    )
    if resume is None:
        _tell_beginning(trainer, {**train_data, **{f"{name} test": data for name, data in test_data.items()}}, fresh)
    result = trainer.train(resume_from_checkpoint=resume)
    if trainer.stop_signal.caught:
        if trainer.is_world_process_zero():
            events.write("stopped", step=trainer.state.global_step, signal=trainer.stop_signal.caught)
        return None
    trainer.save_model()
    metrics = {**result.metrics, "steps": trainer.state.global_step, "world_size": args.world_size}
    if test_data:
        metrics.update(_last_evaluation(trainer) or trainer.evaluate())
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            metrics["best_step"] = _best_step(trainer.state)
        drawings = collect_drawings(trainer.deepspeed, test_data, args.device, 12, draw=trainer.is_world_process_zero())
    if args.ema_decay is not None:
        with trainer.averaged_weights():
            trainer.save_model(str(config.run_dir / AVERAGED))
            averaged = trainer.evaluate(metric_key_prefix="eval_ema") if test_data else {}
        if trainer.is_world_process_zero():
            save_run_files(config, facts, config.run_dir / AVERAGED)
            own = {key.replace("eval_ema_", "eval_"): value for key, value in averaged.items()}
            own |= {key: metrics[key] for key in ("steps", "world_size")}
            (config.run_dir / AVERAGED / METRICS_FILE).write_text(json.dumps(own, indent=2) + "\n")
        metrics.update(averaged)
    if trainer.is_world_process_zero():
        folder = config.run_dir
        save_run_files(config, facts, folder)
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")
        write_plots(trainer.state.log_history, folder / PLOTS)
        if test_data:
            save_pictures(drawings, folder)
            write_predictions_page(folder)
        write_report([folder])
    barrier()
    return metrics


def _tell_beginning(trainer: AllInOneTrainer, data: Mapping[str, TaskData], fresh: list[str]) -> None:
    """Warn of heads that are not those of `start_from`, and of what shows of the data without a check of all of it."""
    if fresh:
        names = ", ".join(fresh)
        trainer.warn(0, f"model.start_from: the heads of {names} start fresh: not there, or of other classes or sizes")
    for part in data.values():
        for problem in part.dataset.structural[:_TOLD]:
            trainer.warn(0, str(problem))


def _last_evaluation(trainer: AllInOneTrainer) -> dict[str, float] | None:
    """Metrics of the weights as they are now, when an evaluation during training has just given them."""
    state = trainer.state
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    step = _best_step(state) if best else state.global_step
    for entry in reversed(state.log_history):
        if entry.get("step") == step and "eval_score" in entry:
            return {key: value for key, value in entry.items() if key.startswith("eval_")}
    return None


def _best_step(state: Any) -> int:
    """Step of the best checkpoint. `state.best_global_step` may be an evaluation at which nothing was saved."""
    return int(Path(state.best_model_checkpoint).name.rpartition("-")[2])
