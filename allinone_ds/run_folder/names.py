"""Names of the files and folders that a run writes. Quick to import."""

from __future__ import annotations

CONFIG_FILE = "config.yaml"
MODEL_FILE = "model.json"
METRICS_FILE = "metrics.json"
EVENTS_FILE = "log.jsonl"
LOG_FILE = "train.log"
WEIGHTS_FILE = "model.safetensors"
PAGE_FILE = "predictions.html"
REPORT_FILE = "report.html"
PICTURES = "predictions"
PLOTS = "plots"
AVERAGED = "ema"
EXPORT = "export"
TENSORBOARD = "tensorboard"
WANDB_FILE = "wandb.json"
SUBMISSION = "submission_{}.json"
TRAINER_STATE = "trainer_state.json"
LOCK_FILE = ".lock"
UNFINISHED = ".unfinished-"
"""Start of the name that a checkpoint has until all of it is on the disk."""
BROKEN = "broken-"
"""Start of the name that a checkpoint gets when its files are not what was written."""
OWN_FILES = (CONFIG_FILE, MODEL_FILE, METRICS_FILE, EVENTS_FILE, LOG_FILE, WEIGHTS_FILE, PAGE_FILE, PICTURES, PLOTS,
             REPORT_FILE, AVERAGED, EXPORT, TENSORBOARD, WANDB_FILE, LOCK_FILE, SUBMISSION.format("A"),
             SUBMISSION.format("B"))  # fmt: skip
