"""Names of the files and folders that a run writes. Imports no torch."""

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
WORST_PICTURES = "worst"
DETAILS = "details"
"""Key of metrics.json: task -> what the evaluation found for each class (`allinone_ds/tasks/details.py`)."""
PLOTS = "plots"
AVERAGED = "ema"
EXPORT = "export"
TENSORBOARD = "tensorboard"
WANDB_FILE = "wandb.json"
SUBMISSION = "submission_{}.json"
TRAINER_STATE = "trainer_state.json"
LOCK_FILE = ".lock"
UNFINISHED = ".unfinished-"
"""Prefix of a checkpoint folder's name until all of its files are on the disk."""
BROKEN = "broken-"
"""Prefix that a checkpoint folder gets if its files have changed since they were written."""
OWN_FILES = (CONFIG_FILE, MODEL_FILE, METRICS_FILE, EVENTS_FILE, LOG_FILE, WEIGHTS_FILE, PAGE_FILE, PICTURES, PLOTS,
             WORST_PICTURES, REPORT_FILE, AVERAGED, EXPORT, TENSORBOARD, WANDB_FILE, LOCK_FILE, SUBMISSION.format("A"),
             SUBMISSION.format("B"))  # fmt: skip
"""All files and folders of a run except its checkpoints."""
