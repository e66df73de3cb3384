"""Faults that are injected into a rank before its run starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch


def allow_fp16(rank: int) -> None:
    """Let DeepSpeed accept fp16 on a CPU, and rank 0 print its loss scale after every step."""
    from deepspeed.accelerator import get_accelerator

    from allinone_ds.training.trainer import AllInOneTrainer

    get_accelerator().is_fp16_supported = lambda: True
    step = AllInOneTrainer._balanced_step

    def print_scale(self, model, inputs):
        loss = step(self, model, inputs)
        if rank == 0:
            print(f"loss scale {self.deepspeed.optimizer.loss_scale} after step {inputs.step}", flush=True)
        return loss

    AllInOneTrainer._balanced_step = print_scale


def write_late() -> None:
    """Delay a background checkpoint until the following step has been trained, or for a second at the end of a run."""
    from allinone_ds.balance.balancer import TaskBalancer
    from allinone_ds.run_folder.background_saver import BackgroundSaver

    step, start, steps = TaskBalancer.step, BackgroundSaver.start, []

    def counted(self, *args, **kwargs):
        steps.append(step(self, *args, **kwargs))
        return steps[-1]

    def late(self, number, work):
        before = len(steps)

        def wait_and_work():
            end = time.monotonic() + 1
            while len(steps) == before and time.monotonic() < end:
                time.sleep(0.002)
            work()

        start(self, number, wait_and_work)

    TaskBalancer.step, BackgroundSaver.start = counted, late


def spoil_loss(value: float, steps: range, rank: int) -> None:
    """Multiply the classification loss of rank 1 by a value in these steps."""
    from allinone_ds.tasks.classification import ClassificationTask

    forward, calls = ClassificationTask.forward, iter(range(10**9))

    def multiply(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.training and next(calls) in steps and rank == 1:
            out.loss = out.loss * value
        return out

    ClassificationTask.forward = multiply


def exhaust_memory(rank: int, by_hand: bool) -> None:
    """Let the classification task of rank 1 run out of memory in step 3.

    Args:
        rank: number of this rank.
        by_hand: raise the exception of CUDA, instead of requesting more than the CPU's allocator can give.
    """
    from allinone_ds.tasks.classification import ClassificationTask

    forward, calls = ClassificationTask.forward, iter(range(10**9))

    def allocate(self, *args, **kwargs):
        if next(calls) == 3 and rank == 1:
            if by_hand:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            torch.empty(2**50, dtype=torch.uint8)  # 1 PiB
        return forward(self, *args, **kwargs)

    ClassificationTask.forward = allocate


def count_reads(file: Path) -> None:
    """Add a line to a file for each image that is decoded."""
    from allinone_ds.data.formats import coco, label_maps
    from allinone_ds.data.formats.common import classified_files

    for module in (classified_files, coco, label_maps):

        def counted(path, *args, _read=module.read_image, **kwargs):
            with file.open("a") as sink:
                sink.write(f"{path}\n")
            return _read(path, *args, **kwargs)

        module.read_image = counted


def score_by_step(scores: dict[int, float], stop_in: int | None, rank: int) -> None:
    """Replace evaluations by these scores (step -> score), and let rank 0 send itself SIGTERM before step `stop_in`."""
    from allinone_ds.training.trainer import AllInOneTrainer

    step = AllInOneTrainer.training_step

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_score": scores[self.state.global_step]}
        self.details = {("eval", number): {} for number in scores}  # as if no evaluation was before a resume
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def stopped(self, *args, **kwargs):
        if rank == 0 and self.state.global_step + 1 == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    AllInOneTrainer.evaluate, AllInOneTrainer.training_step = evaluate, stopped
