"""A tiny run on demo data, and a function that starts it through the real launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from allinone_ds.testing.launcher import torchrun
from allinone_ds.training.launcher import free_port, launch_environment

TEST_SAMPLES = {"det": 9, "seg": 7, "cls": 11}  # odd, so two ranks get unequal numbers


def tiny_run(folder: Path) -> dict[str, Any]:
    """Return the content of the run's YAML file: three tasks, 4 steps, a checkpoint and an evaluation every 2 steps."""

    def source(kind: str, split: str) -> dict[str, str]:
        if kind == "detection":
            return {"format": "coco", "images": f"{kind}/{split}", "annotations": f"{kind}/{split}.json"}
        classes = {"classes": f"{kind}/classes.txt"}
        if kind == "segmentation":
            where = {"images": f"{kind}/{split}/images", "label_maps": f"{kind}/{split}/label_maps"}
            return {"format": "label_maps", **where, **classes}
        return {"format": "image_list", "images": f"{kind}/{split}", "list": f"{kind}/{split}.txt", **classes}

    def task(kind: str, **values: Any) -> dict[str, Any]:
        return {"type": kind, "image_size": 32, "train": source(kind, "train"), "test": source(kind, "test"), **values}

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 32}
    return {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "data_root": str(folder / "data"),
        "model": {"backbone": {"stem": "conv", "config": sizes}},
        "tasks": {
            "det": task("detection", options={"width": 32, "num_convs": 1}, batch_size=2, micro_steps=2),
            "seg": task("segmentation", options={"width": 32}, batch_size=2),
            "cls": task("classification", batch_size=4, eval_batch_size=3, augment=["RandomHorizontalFlip"]),
        },
        "trainer": {
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
    }


def launch(
    home: Path, launcher: str, *arguments: str, ranks: int = 2, config: str = "tiny.yaml"
) -> subprocess.CompletedProcess[str]:
    """Train the run of a file through a launcher, "deepspeed" or "torchrun"; fail the test if training fails."""
    environment = {**launch_environment(ranks, compiles=False), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1]) + os.pathsep + environment.get("PYTHONPATH", "")
    worker = ["-m", "allinone_ds.train", config, *arguments]
    if launcher == "deepspeed":
        start = ["deepspeed.launcher.runner", f"--num_accelerators={ranks}", f"--master_port={free_port()}"]
        command = [sys.executable, "-m", *start, "--module", *worker[1:]]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    else:
        done = torchrun(worker, ranks, environment=environment, folder=home, capture=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done
