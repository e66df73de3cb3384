"""Two ranks train a tracked run, interrupt it and resume it. Started by test_trackers.py."""

import shutil
import sys
from pathlib import Path

import torch.distributed as dist
import wandb

from allinone_ds.run_config.schema import load_config
from allinone_ds.training.run import train_run
from tests.launcher import run_checks

HOME, FOLDER = Path(sys.argv[2]), Path(sys.argv[3])
OVERRIDES = [
    f"output_dir={FOLDER}",
    "trainer.report_to=[wandb,tensorboard]",
    "trainer.async_save=true",
    "trainer.ema_decay=0.9",
    "balancer.cosines_every=2",
]


def check_train() -> None:
    train_run(load_config(HOME / "tiny.yaml", OVERRIDES))
    wandb.finish()


def check_resume() -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(FOLDER / "checkpoint-4")  # as if it had been broken off after step 2
    dist.barrier()
    train_run(load_config(HOME / "tiny.yaml", [*OVERRIDES, "trainer.resume_from_checkpoint=true"]))
    wandb.finish()


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
