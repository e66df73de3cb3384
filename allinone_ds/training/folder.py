"""The folder of a run: names of what lies in it, its checkpoints, clearing it. Quick to import."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from allinone_ds.strict import ConfigError

CONFIG_FILE = "config.yaml"
MODEL_FILE = "model.json"
METRICS_FILE = "metrics.json"
EVENTS_FILE = "log.jsonl"
LOG_FILE = "train.log"
WEIGHTS_FILE = "model.safetensors"
PAGE_FILE = "predictions.html"
PICTURES = "predictions"
PLOTS = "plots"
AVERAGED = "ema"
OWN_FILES = (CONFIG_FILE, MODEL_FILE, METRICS_FILE, EVENTS_FILE, LOG_FILE, WEIGHTS_FILE, "training_args.bin",
             PAGE_FILE, PICTURES, PLOTS, AVERAGED)  # fmt: skip


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted((p for p in found if p.is_dir()), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_to_resume(asked: Any, folder: Path) -> str | None:
    """The checkpoint that a run starts from.

    Args:
        asked: `trainer.resume_from_checkpoint`: true is the last one of the folder, or a checkpoint's own folder.
        folder: the run's.

    Raises:
        ConfigError: there is none to resume from, or the folder holds checkpoints that nobody asked to resume.
    """
    last = checkpoints(folder)[-1:]
    if str(asked).lower() == "true":
        if not last:
            raise ConfigError(f"trainer.resume_from_checkpoint: there is no checkpoint in {folder}; leave it out")
        return str(last[0])
    if asked and str(asked).lower() != "false":
        if not Path(asked).is_dir():
            raise ConfigError(f"trainer.resume_from_checkpoint = {asked}: there is no such folder")
        return str(asked)
    if last:
        raise ConfigError(
            f"{folder} already holds {last[0].name}: go on with trainer.resume_from_checkpoint=true, give another "
            "output_dir, or delete the folder"
        )
    return None


def clear_run(folder: str | Path) -> None:
    """Delete what an earlier run left in a folder, and nothing else."""
    folder = Path(folder)
    for path in [*(folder / name for name in OWN_FILES), *checkpoints(folder)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
