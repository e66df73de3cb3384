"""Trackers of a run: the W&B and TensorBoard callbacks of transformers' `report_to`, extended for many tasks.

Keys in W&B and TensorBoard:
    train/NAME                  values of a training log; `TaskLogs` in reporting/logs.py lists the names
    eval/TASK_METRIC            metrics of every evaluation
    eval/score                  mean of the tasks' main metrics
    eval/TASK_class/CLASS/NAME  values of each class, for tasks with few classes
    predictions/TASK            test images with predictions
    predictions/TASK/lowest_scores    the test images with the lowest scores
    train/global_step           optimizer step, the x axis of everything in W&B
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations import TensorBoardCallback, WandbCallback

from allinone_ds.atomic_file import write_atomically
from allinone_ds.distributed import any_rank
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.run_folder.names import CONFIG_FILE, MODEL_FILE, TENSORBOARD, WANDB_FILE, WEIGHTS_FILE
from allinone_ds.tasks.drawing import to_pil

STEP = "train/global_step"
METRIC = "eval/{task}_{metric}"
SCORE = "eval/score"
PICTURES = "predictions/{task}"
LOWEST = "lowest_scores"
CHARTS = {
    "loss": "train/loss/.*",
    "metrics": "eval/[^/]*$",
    "backbone gradient norm before balancing": "train/grad_norm/.*/raw$",
    "factor of the gradient": "train/grad_norm/.*/scale$",
    "backbone gradient norm after balancing": "train/grad_norm/.*/scaled$",
    "share of the update": "train/grad_norm/.*/share$",
    "images per second": "train/images_per_second/.*",
    "cosines": "train/cosine/.*",
}
"""Title of a chart with one line per task -> regular expression of its keys."""


class Tracker(Protocol):
    """A callback that also logs pictures."""

    def show(self, pictures: Mapping[str, Sequence[Tensor]], step: int) -> None:
        """Log predictions drawn on images.

        Args:
            pictures: task -> pictures, each uint8 (3, H, W).
            step: optimizer step.
        """


class TrackedTrainer(Protocol):
    """What the trackers use of an `AllInOneTrainer`.

    Attributes:
        args: training arguments, of which `output_dir` is used.
        state: state of the run, of which `global_step` is used.
        saver: writer of checkpoints in the background, of which `finish()` is used; None without `async_save`.
    """

    args: Any
    state: Any
    saver: Any

    def pop_callback(self, callback: Any) -> Any: ...
    def add_callback(self, callback: Any) -> Any: ...
    def save_model(self) -> Any: ...
    def warn(self, step: int, message: str) -> None: ...


def use_own_trackers(trainer: TrackedTrainer) -> list[Tracker]:
    """Replace the callbacks that `report_to` added by those of this file, after all other callbacks.

    Returns:
        The new callbacks.
    """
    trackers: list[Tracker] = []
    if trainer.pop_callback(WandbCallback):
        trackers.append(WandbTracker(trainer))
    if trainer.pop_callback(TensorBoardCallback):
        trackers.append(TensorBoardTracker(str(trainer.args.output_dir)))
    for tracker in trackers:
        trainer.add_callback(tracker)
    return trackers


class WandbTracker(WandbCallback):
    """Weights & Biases: transformers' callback with its environment variables, and in addition:

    - Without a key and without WANDB_MODE the run is written offline. `wandb sync` uploads it later.
    - A resumed run keeps its id, which is stored in RUN/wandb.json.
    - The x axis of every metric is the optimizer step. W&B's own row counter increases over resumes too, because W&B
      drops rows whose counter decreases.
    - The run's summary has the best value of every task's main metric and of the score.
    - config.yaml is `run` in the run's config. config.yaml and model.json are an artifact; with WANDB_LOG_MODEL=end or
      WANDB_LOG_MODEL=checkpoint the final weights are one too.

    Args:
        trainer: saves the weights at the end. transformers' callback would build a second Trainer around the bare
            model, which fails when ZeRO-3 has partitioned it.
    """

    def __init__(self, trainer: TrackedTrainer) -> None:
        super().__init__()
        self.trainer = trainer

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            self._initialized = True
            return
        before = self._read_id(Path(args.output_dir) / WANDB_FILE) if state.global_step else {}
        if self._wandb.run is None:
            self._wandb.init(
                project=os.getenv("WANDB_PROJECT", "huggingface"),
                name=args.run_name,
                id=os.getenv("WANDB_RUN_ID", before.get("id")),
                resume="allow",
                mode=os.getenv("WANDB_MODE") or (None if self._wandb.api.api_key else "offline"),
            )
        super().setup(args, state, model, **kwargs)
        run = self._wandb.run
        config = Path(args.output_dir) / CONFIG_FILE
        if config.is_file():
            run.config.update({"run": yaml.safe_load(config.read_text())}, allow_val_change=True)
        for name, task in tasks_of(model).items():
            best = "min" if task.better_is_greater(task.main_metric) is False else "max"
            run.define_metric(METRIC.format(task=name, metric=task.main_metric), step_metric=STEP, summary=best)
        run.define_metric(SCORE, step_metric=STEP, summary="max")
        if run.step < before.get("rows", 0):  # an offline run does not get its row counter from the server
            run.log({STEP: state.global_step}, step=before["rows"])
        self._log_files(args, "config", "config", (CONFIG_FILE, MODEL_FILE))

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, model=model, logs=logs, **kwargs)
        if state.is_world_process_zero:
            self._write_id()

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if any_rank(self._log_model.is_enabled, args.device):
            self.trainer.save_model()  # collective
            if state.is_world_process_zero:
                self._log_files(args, "model", "model", (WEIGHTS_FILE, CONFIG_FILE, MODEL_FILE), ["final_model"])

    def show(self, pictures: Mapping[str, Sequence[Tensor]], step: int) -> None:
        named = {
            PICTURES.format(task=task): [self._wandb.Image(to_pil(picture)) for picture in _of_one_size(drawn)]
            for task, drawn in pictures.items()
        }
        self._wandb.log({**named, STEP: step})
        self._write_id()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = self._log_model.value == "checkpoint"
        if self.trainer.saver is not None and any_rank(wanted, args.device):
            self.trainer.saver.finish()  # collective; the checkpoint is renamed into place only then
        super().on_save(args, state, control, **kwargs)

    def _read_id(self, file: Path) -> dict[str, Any]:
        """Return "id" and "rows", the row counter, of the run that is resumed; {} if the file cannot be used."""
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text())
            return {"id": str(content["id"]), "rows": int(content["rows"])}
        except (ValueError, KeyError, TypeError):
            step = self.trainer.state.global_step
            self.trainer.warn(
                step, f"{file} cannot be read: W&B gets a new run; set WANDB_RUN_ID to continue the old one"
            )
            return {}

    def _write_id(self) -> None:
        """Write id and row counter after every row, since a run may be killed before its next checkpoint."""
        run = self._wandb.run
        if run.disabled:  # WANDB_MODE=disabled has no row counter
            return
        file = Path(str(self.trainer.args.output_dir)) / WANDB_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"id": run.id, "rows": run.step}) + "\n")

    def _log_files(
        self, args: Any, what: str, kind: str, names: Sequence[str], aliases: Sequence[str] | None = None
    ) -> None:
        """Log those of the run's files that exist; a script that uses AllInOneTrainer writes no config.yaml."""
        files = [file for file in (Path(args.output_dir) / name for name in names) if file.is_file()]
        if files:
            artifact = self._wandb.Artifact(f"{what}-{self._wandb.run.id}", type=kind)
            for file in files:
                artifact.add_file(str(file))
            self._wandb.run.log_artifact(artifact, aliases=list(aliases) if aliases else None)


def _of_one_size(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Return pictures padded with white to one size (3, H, W): W&B shows a list of images in the size of the first."""
    H, W = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    white = [(0, W - picture.shape[2], 0, H - picture.shape[1]) for picture in pictures]
    return [F.pad(picture, edges, value=255) for picture, edges in zip(pictures, white, strict=True)]


class TensorBoardTracker(TensorBoardCallback):
    """TensorBoard: transformers' callback, which writes to RUN/tensorboard.

    A resumed run continues there and replaces what it had logged after the step of its checkpoint. The page "Custom
    scalars" has the charts of `CHARTS`, each with the lines of all tasks.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        if self.logging_dir is None:  # TENSORBOARD_LOGGING_DIR
            self.logging_dir = str(Path(folder) / TENSORBOARD)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            purge = state.global_step + 1 if state.global_step else None
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=purge)
        super().on_train_begin(args, state, control, **kwargs)
        self.tb_writer.add_custom_scalars({"all tasks": {name: ["Multiline", [key]] for name, key in CHARTS.items()}})
        config = Path(args.output_dir) / CONFIG_FILE
        if config.is_file():
            self.tb_writer.add_text("config", f"```yaml\n{config.read_text()}```")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.tb_writer:
            self.tb_writer.flush()  # not closed, since an evaluation may follow

    def show(self, pictures: Mapping[str, Sequence[Tensor]], step: int) -> None:
        for task, drawn in pictures.items():
            for number, picture in enumerate(drawn):
                self.tb_writer.add_image(f"{PICTURES.format(task=task)}/{number}", picture, step)
        self.tb_writer.flush()
