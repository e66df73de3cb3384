"""The run that the faults hit: three tasks on 32 pixels, with everything switched on that a long run uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from allinone_ds.data.demo import DemoData, DemoSizes, SceneLook, make_demo_data

SAVE_STEPS = 40
LOGGING_STEPS = 5
NAN_EVERY = 100
"""Steps between two losses that are NaN."""
STALL_TIMEOUT = 150
"""Seconds: a connection that was down for 60 s is tried again by TCP after 102 s at the latest."""
FOREVER = 10**7
"""Steps of a run that the command ends."""


def make_data(folder: Path) -> None:
    """Write the data, unless it is there."""
    sizes = DemoSizes(
        detection=(1000, 48),
        segmentation=(1000, 48),
        classification=(2000, 48),
        detection_look=SceneLook(size=32, scale=(0.5, 0.8)),
        segmentation_look=SceneLook(size=32, scale=(0.55, 0.9), overlap=0.15),
        classification_look=SceneLook(size=32, objects=(1, 1), scale=(0.65, 0.95)),
    )
    make_demo_data(folder, sizes=sizes, progress=False)


def content(data: Path, output: Path, progress: Path, steps: int) -> dict[str, Any]:
    """Return the content of the run's YAML file.

    Args:
        data: folder of the data.
        output: folder of the run.
        progress: file to which rank 0 writes the step.
        steps: length of the run. It decides neither a rate nor the order of the data.
    """
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    sources = DemoData(data)

    def task(name: str, head: str, batch: int, **options: Any) -> dict[str, Any]:
        return {
            "type": name, "head": head, "options": options, "image_size": 32, "batch_size": batch,
            "eval_batch_size": 16, "train": sources.sources(name, "train"), "test": sources.sources(name, "test"),
            "augment": ["RandomHorizontalFlip"],
        }  # fmt: skip

    callbacks = "benchmarks.faults.weeks.callbacks"
    return {
        "name": "weeks",
        "data_root": str(data),
        "output_dir": str(output),
        "model": {"backbone": {"stem": "conv", "out_indices": [2], "config": sizes}},
        "tasks": {
            "det": task("detection", "fcos", 2, width=32, num_convs=1, prior=0.05),
            "seg": task("segmentation", "light", 2, width=32, prior="data"),
            "cls": task("classification", "linear", 4, dropout=0.1),
        },
        "callbacks": [
            {f"{callbacks}.NanLosses": {"every": NAN_EVERY}},
            {f"{callbacks}.Progress": {"file": str(progress)}},
        ],
        "max_broken_images": 0,  # else images would be replaced while the data is gone, and the runs differ
        "deepspeed": "configs/deepspeed/zero2.json",
        "trainer": {
            "max_steps": steps,
            "learning_rate": 1e-3,
            "backbone_lr_factor": 1.0,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 50,
            "logging_steps": LOGGING_STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "async_save": True,
            "ema_decay": 0.99,
            "eval_strategy": "steps",
            "eval_steps": 5 * SAVE_STEPS,
            "dataloader_num_workers": 1,
            "stall_timeout": STALL_TIMEOUT,
        },
    }


def write_run(file: Path, **values: Any) -> None:
    """Write the YAML file of a run, see `content`."""
    file.write_text(yaml.safe_dump(content(**values), sort_keys=False))
