"""Trackers of a run: those of transformers' `report_to`, with what a balanced run of many tasks needs beside them."""

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

from allinone_ds.distributed import any_rank
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.run_folder.atomic_file import write_atomically
from allinone_ds.run_folder.names import CONFIG_FILE, MODEL_FILE, TENSORBOARD, WANDB_FILE, WEIGHTS_FILE
from allinone_ds.tasks.drawing import to_pil

STEP = "train/global_step"
"""The one x axis of everything that is logged to W&B: optimizer steps."""


class Tracker(Protocol):
    """A callback that also takes pictures."""

    def show(self, pictures: Mapping[str, Sequence[Tensor]], step: int) -> None:
        """Log predictions drawn on images.

        Args:
            pictures: by task, each uint8 (3, H, W).
            step: optimizer step.
        """


def use_own_trackers(trainer: Any) -> list[Tracker]:
    """Put the trackers of this file in the places of those that `report_to` asked for, behind the other callbacks."""
    trackers: list[Tracker] = []
    if trainer.pop_callback(WandbCallback):
        trackers.append(WandbTracker(trainer))
    if trainer.pop_callback(TensorBoardCallback):
        trackers.append(TensorBoardTracker(str(trainer.args.output_dir)))
    for tracker in trackers:
        trainer.add_callback(tracker)  # type: ignore[arg-type]
    return trackers


class WandbTracker(WandbCallback):
    """Weights & Biases: transformers' callback and its environment variables, and beside them

    - without a key (and without WANDB_MODE) the run is written offline, to be sent later with `wandb sync`;
    - a resumed run goes on under the id it had, which RUN/wandb.json keeps;
    - every metric has one x axis, the optimizer step. W&B's own counter only rises, over resumes too: rows below it
      would be dropped;
    - in the run's summary a task's main metric and the score are the best they were;
    - config.yaml is `run` in the run's config, and with model.json an artifact; with WANDB_LOG_MODEL=end or checkpoint
      the final weights are one too.

    Args:
        trainer: whose weights are saved at the end. transformers' own callback would build a second Trainer around the
            bare model, which a partitioned model does not survive.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            self._initialized = True
            return
        before = self._remembered(Path(args.output_dir) / WANDB_FILE) if state.global_step else {}
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
            run.define_metric(f"eval/{name}_{task.main_metric}", step_metric=STEP, summary="max")
        run.define_metric("eval/score", step_metric=STEP, summary="max")
        if run.step < before.get("rows", 0):  # an offline run cannot ask the server where it stood
            run.log({STEP: state.global_step}, step=before["rows"])
        self._log_files(args, "config", "config", (CONFIG_FILE, MODEL_FILE))

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, model=model, logs=logs, **kwargs)
        if state.is_world_process_zero:
            self._remember()

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if any_rank(self._log_model.is_enabled, args.device):
            self.trainer.save_model()  # collective
            if state.is_world_process_zero:
                self._log_files(args, "model", "model", (WEIGHTS_FILE, CONFIG_FILE, MODEL_FILE), ["final_model"])

    def show(self, pictures: Mapping[str, Sequence[Tensor]], step: int) -> None:
        named = {
            f"predictions/{task}": [self._wandb.Image(to_pil(picture)) for picture in _of_one_size(drawn)]
            for task, drawn in pictures.items()
        }
        self._wandb.log({**named, STEP: step})
        self._remember()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = self._log_model.value == "checkpoint"
        if self.trainer.saver is not None and any_rank(wanted, args.device):
            self.trainer.saver.finish()  # collective; the folder is not there before
        super().on_save(args, state, control, **kwargs)

    def _remembered(self, memory: Path) -> dict[str, Any]:
        """Id and row counter of the run that is resumed."""
        if not memory.is_file():
            return {}
        try:
            content = json.loads(memory.read_text())
            return {"id": str(content["id"]), "rows": int(content["rows"])}
        except (ValueError, KeyError, TypeError):
            step = self.trainer.state.global_step
            self.trainer.warn(step, f"{memory} cannot be read: W&B gets a new run; WANDB_RUN_ID names the old one")
            return {}

    def _remember(self) -> None:
        """Keep id and row counter after every row, for a run that is killed before its next checkpoint too."""
        run = self._wandb.run
        if run.disabled:  # WANDB_MODE=disabled counts nothing
            return
        memory = Path(str(self.trainer.args.output_dir)) / WANDB_FILE
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({"id": run.id, "rows": run.step}) + "\n")

    def _log_files(
        self, args: Any, what: str, kind: str, names: Sequence[str], aliases: Sequence[str] | None = None
    ) -> None:
        """Log those of the run's files that exist (a Trainer script of one's own writes no config.yaml)."""
        files = [file for file in (Path(args.output_dir) / name for name in names) if file.is_file()]
        if files:
            artifact = self._wandb.Artifact(f"{what}-{self._wandb.run.id}", type=kind)
            for file in files:
                artifact.add_file(str(file))
            self._wandb.run.log_artifact(artifact, aliases=list(aliases) if aliases else None)


def _of_one_size(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Pictures (3, H, W) with white to their right and below: W&B shows those of a list in the size of the first."""
    H, W = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    white = [(0, W - picture.shape[2], 0, H - picture.shape[1]) for picture in pictures]
    return [F.pad(picture, edges, value=255) for picture, edges in zip(pictures, white, strict=True)]


class TensorBoardTracker(TensorBoardCallback):
    """TensorBoard: transformers' callback, in RUN/tensorboard; a resumed run goes on there, and what the run had logged
    beyond the checkpoint is replaced.

    Args:
        folder: of the run.
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
        config = Path(args.output_dir) / CONFIG_FILE
        if config.is_file():
            self.tb_writer.add_text("config", f"```yaml\n{config.read_text()}```")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.tb_writer:
            self.tb_writer.flush()  # not closed: the last evaluation may come after training

    def show(self, pictures: Mapping[str, Sequence[Tensor]], step: int) -> None:
        for task, drawn in pictures.items():
            for number, picture in enumerate(drawn):
                self.tb_writer.add_image(f"predictions/{task}/{number}", picture, step)
        self.tb_writer.flush()
