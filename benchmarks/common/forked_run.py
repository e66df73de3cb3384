"""A tiny training run whose ranks are forked from one process: a start takes one second instead of ten."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.training.launcher import free_port, quiet_environment

STEPS = 8
SAVE_STEPS = 2
LOGGING_STEPS = 3  # no divisor of SAVE_STEPS: a checkpoint must also restore a log that is half accumulated


def tiny_run(folder: Path) -> dict[str, Any]:
    """Return the content of the run's YAML file: three tasks, dropout, augmentation, no evaluation."""

    def task(kind: str, train: dict[str, str], **values: Any) -> dict[str, Any]:
        images = f"{kind}/train/images" if kind == "segmentation" else f"{kind}/train"
        return {"type": kind, "image_size": 32, "train": {"images": images, **train}, **values}

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 32}
    detection = {"format": "coco", "annotations": "detection/train.json"}
    maps = {
        "format": "label_maps",
        "label_maps": "segmentation/train/label_maps",
        "classes": "segmentation/classes.txt",
    }
    listed = {"format": "image_list", "list": "classification/train.txt", "classes": "classification/classes.txt"}
    return {
        "name": "faults",
        "data_root": str(folder / "data"),
        "model": {"backbone": {"stem": "conv", "config": sizes}},
        "tasks": {
            "det": task("detection", detection, options={"width": 32, "num_convs": 1}, batch_size=2, micro_steps=2),
            "seg": task("segmentation", maps, options={"width": 32}, batch_size=2),
            "cls": task(
                "classification", listed, options={"dropout": 0.2}, batch_size=4, augment=["RandomHorizontalFlip"]
            ),
        },
        "trainer": {
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "logging_steps": LOGGING_STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
        },
    }


def make_run(folder: Path) -> Path:
    """Write the run's file and its data into a folder; return the path of the file."""
    from allinone_ds.data.demo import DemoSizes, make_demo_data

    sizes = DemoSizes(detection=(24, 1), segmentation=(24, 1), classification=(24, 1))
    make_demo_data(folder / "data", sizes=sizes, progress=False)
    file = folder / "faults.yaml"
    file.write_text(yaml.safe_dump(tiny_run(folder)))
    return file


def import_everything() -> None:
    """Import what a run imports, without starting a thread: the ranks are forked from this process."""
    os.environ.update(quiet_environment())
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1")
    torch.set_num_threads(1)
    import warnings

    warnings.filterwarnings("ignore")
    import allinone_ds.train
    import allinone_ds.training.run

    allinone_ds.training.run.write_plots = lambda history, folder: []  # a third of the time of such a short run
    gc.collect()
    gc.freeze()  # otherwise each rank's first collection examines everything that was imported


class Ranks:
    """The ranks of one run, which start on construction.

    Args:
        file: the run's YAML file.
        output: folder of the run.
        overrides: dotted overrides and flags.
        world: number of ranks.
        before: called on each rank with its number before the run starts, for example to inject a fault.
    """

    def __init__(
        self, file: Path, output: Path, *overrides: str, world: int = 2, before: Callable[[int], None] | None = None
    ) -> None:
        self.output = output
        self.log = output.with_suffix(".log")
        self.codes: dict[int, int] = {}
        port = str(free_port())
        arguments = [str(file), f"output_dir={output}", *overrides]
        sys.stdout.flush()
        self.pids = [self._fork(rank, world, port, arguments, before) for rank in range(world)]

    def _fork(
        self, rank: int, world: int, port: str, arguments: list[str], before: Callable[[int], None] | None
    ) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()  # a signal to the benchmark's process group must not look like a fault of the run
            sink = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_SIZE=str(world))
            from allinone_ds import train

            if before is not None:
                before(rank)
            status = train.main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def alive(self) -> list[int]:
        """Return the ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks (none given: to all) if they have not ended."""
        for rank in ranks or range(len(self.pids)):
            if rank in self.alive():
                os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 120.0, grace: float = 5.0) -> dict[int, int]:
        """Wait until all ranks have ended; return their exit statuses.

        Args:
            seconds: to wait at most.
            grace: seconds between the failure of one rank and the end of the others, which launchers kill as well.

        Raises:
            TimeoutError: the ranks ran longer than `seconds`; they have been killed.
        """
        end = time.monotonic() + seconds
        failed: float | None = None
        while self.alive():
            now = time.monotonic()
            if failed is None and any(self.codes.values()):
                failed = now
            if now > end or (failed is not None and now > failed + grace):
                self.kill()
                if failed is None:
                    raise TimeoutError(f"the ranks ran longer than {seconds} s:\n{self.printed()[-3000:]}")
            time.sleep(0.005)
        return self.codes

    def kill(self) -> None:
        """Kill the ranks that have not ended."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        while self.alive():
            time.sleep(0.01)

    def printed(self) -> str:
        """Return what the ranks have printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_step(self, step: int, seconds: float = 60.0) -> None:
        """Wait until there is a checkpoint of this step or a later one, or the ranks have ended."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end and last_step(self.output) < step:
            time.sleep(0.002)


def last_step(output: Path) -> int:
    """Return the step of a run's last checkpoint; 0 if there is none."""
    saved = checkpoints(output)
    return int(saved[-1].name.rpartition("-")[2]) if saved else 0
