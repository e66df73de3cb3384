"""Break a tiny run in every way we know, go on from its checkpoint, and compare with a run that nothing happened to.

    python benchmarks/faults.py --times 100             # the table of docs/reliability.md, about 20 minutes on 2 cores
    python benchmarks/faults.py --times 2 --only kill   # rows whose name holds the word
    python benchmarks/faults.py --async                 # with checkpoints that are written in the background

"Lost nothing" means: the run was found and resumed without help and ended with the same weights and the same logged
losses, norms and rates as the unbroken run, bit for bit (2 ranks, CPU, fp32), and, where the fault is to be named, it
was. Faults that need no luck are tried once for each ZeRO stage. With `--async` the unbroken run saves in the step, the
others in the background, where a checkpoint is written only after the next step has been trained.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from fault_runs import (  # noqa: E402
    LOGGING_STEPS,
    SAVE_STEPS,
    STEPS,
    Ranks,
    differences,
    import_everything,
    last_step,
    make_home,
    memory_disk,
    outcome,
)

from allinone_ds.training.files import find_config  # noqa: E402
from allinone_ds.training.folder import checkpoints  # noqa: E402

CUT = "run cut in pieces"
LUCKY = ("kill", "SIGTERM", "SIGUSR1", "truncated", "bit flip")  # rows that `--times` repeats


class Lost(Exception):
    """Something was lost, or the run did not say what happened."""


class NotPossible(Exception):
    """The fault cannot be injected on this machine."""


def demand(holds: bool, what: str, ranks: Ranks | None = None) -> None:
    if not holds:
        raise Lost(what + (f"; the ranks said:\n{ranks.said()[-2500:]}" if ranks else ""))


@dataclass
class Row:
    """One line of the table."""

    fault: str
    how: str
    tried: int = 0
    kept: int = 0
    notes: list[str] = field(default_factory=list)


class Bench:
    """One try of each fault is one method; it raises `Lost` when anything was lost.

    Args:
        home: an empty folder.
        seed: of the moments at which faults strike.
        background: checkpoints are written while training goes on.
    """

    def __init__(self, home: Path, seed: int, background: bool = False) -> None:
        self.home = home
        self.background = background
        self.file = make_home(home)
        self.random = random.Random(seed)
        self.stage = 1
        self.count = 0
        self.in_save = 0
        self.wholes: dict[int, tuple] = {}
        self.seconds: dict[int, float] = {}

    # ---- runs ----

    def start(self, output: Path, *overrides: str, before: Callable[[int], None] | None = None) -> Ranks:
        stage = f"deepspeed=configs/deepspeed/zero{self.stage}.json"
        if not self.background:
            return Ranks(self.file, output, stage, *overrides, before=before)

        def before_both(rank: int) -> None:
            write_late()
            if before is not None:
                before(rank)

        return Ranks(self.file, output, stage, "trainer.async_save=true", *overrides, before=before_both)

    def output(self) -> Path:
        self.count += 1
        return self.home / f"run{self.count}"

    def whole(self) -> tuple:
        """Outcome of the unbroken run of this stage."""
        if self.stage not in self.wholes:
            output = self.output()
            begun = time.monotonic()
            ranks = Ranks(self.file, output, f"deepspeed=configs/deepspeed/zero{self.stage}.json")
            demand(not any(ranks.wait().values()), "the unbroken run failed", ranks)
            self.seconds[self.stage] = time.monotonic() - begun
            self.wholes[self.stage] = outcome(output)
            kept = [path.name for path in checkpoints(output)]
            demand(
                kept == [f"checkpoint-{STEPS - SAVE_STEPS}", f"checkpoint-{STEPS}"], f"save_total_limit 2 kept {kept}"
            )
        return self.wholes[self.stage]

    def go_on(self, output: Path, *overrides: str) -> Ranks:
        """Resume to the end (from the beginning when nothing was saved yet) and compare."""
        flags = ["--resume"] if checkpoints(output) else []
        ranks = self.start(output, *flags, *overrides)
        demand(not any(ranks.wait().values()), "the run could not go on", ranks)
        found = differences(output, self.whole())
        demand(not found, found)
        demand(not list(output.glob(".unfinished*")), "an unfinished checkpoint was left")
        shutil.rmtree(output)
        output.with_suffix(".log").unlink()
        return ranks

    def moment(self) -> float:
        """A random moment of a run, in seconds from its start."""
        self.whole()
        return self.random.uniform(0.2, 0.95) * self.seconds.get(self.stage, 2.0)

    # ---- faults ----

    def reshard(self) -> None:
        """2 ranks with ZeRO-2, then 4 ranks with ZeRO-2, then 1 rank with ZeRO-3: the losses of 2 ranks throughout.

        Both tasks are means over images, and ranks x batch size stays, so the same images give the same gradient.
        """
        content = yaml.safe_load(self.file.read_text())
        plain = {**content["tasks"]["cls"], "options": {}}
        content["tasks"] = {"one": plain, "two": plain}
        content["trainer"].update(logging_steps=1, save_total_limit=STEPS)
        file = self.home / "reshard.yaml"
        file.write_text(yaml.safe_dump(content))

        def start(output: Path, stage: int, world: int, *flags: str) -> Ranks:
            batches = [f"tasks.{task}.batch_size={4 // world}" for task in ("one", "two")]
            return Ranks(file, output, f"deepspeed=configs/deepspeed/zero{stage}.json", *batches, *flags, world=world)

        whole, output = self.output(), self.output()
        ranks = start(whole, 2, 2)
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        shutil.copytree(whole / f"checkpoint-{SAVE_STEPS}", output / f"checkpoint-{SAVE_STEPS}")
        ranks = start(output, 2, 4, "--resume")
        ranks.wait_for_step(2 * SAVE_STEPS)
        ranks.send(signal.SIGKILL)
        ranks.wait()
        demand(2 * SAVE_STEPS <= last_step(output) < STEPS, "4 ranks did not get on", ranks)
        ranks = start(output, 3, 1, "--resume")
        demand(not any(ranks.wait().values()), "1 rank could not go on", ranks)
        wanted, found = ([e["loss"] for e in outcome(o)[1] if "loss" in e] for o in (whole, output))
        off = max(abs(a - b) for a, b in zip(wanted, found, strict=True))
        demand(off < 5e-6 * max(wanted), f"the losses differ by {off:.1e}")

    def cut_fp16(self) -> None:
        """The loss scale, which falls in most of these steps, goes on where it was."""
        content = json.loads(find_config("configs/deepspeed/zero2.json").read_text())
        content.pop("bf16")
        content["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}
        file = self.home / "fp16.json"
        file.write_text(json.dumps(content))
        flags = (f"deepspeed={file}", "trainer.fp16=true", f"trainer.save_total_limit={STEPS}")
        whole, output = self.output(), self.output()
        scales: list[list[str]] = []
        for place in (whole, output):
            resume = ["--resume"] if place == output else []
            ranks = Ranks(self.file, place, *flags, *resume, before=allow_fp16)
            demand(not any(ranks.wait().values()), "the run failed", ranks)
            scales.append([line for line in ranks.said().splitlines() if line.startswith("loss scale")])
            if place == whole:
                shutil.copytree(whole / f"checkpoint-{STEPS // 2}", output / f"checkpoint-{STEPS // 2}")
        demand(len(set(scales[0])) > 2, f"the loss scale hardly moved: {scales[0]}")
        demand(scales[1] == scales[0][STEPS // 2 :], f"other loss scales: {scales}")
        found = differences(output, outcome(whole))
        demand(not found, found)

    def cut_between_logs(self) -> None:
        """Cosines that were measured before the cut are logged after it; a task left out before it stays counted."""
        flags = ("balancer.cosines_every=2", "trainer.save_steps=1", f"trainer.save_total_limit={STEPS}")
        whole, output = self.output(), self.output()
        ranks = self.start(whole, *flags, before=lambda rank: spoil_loss(float("nan"), range(1, 2), rank))
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        step = LOGGING_STEPS + 2  # the last measured step before the next log
        shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
        ranks = self.start(output, *flags, "--resume")
        demand(not any(ranks.wait().values()), "the run could not go on", ranks)
        log = [entry for entry in outcome(whole)[1] if "loss" in entry and entry["step"] > step][0]
        demand("cosine/det/seg" in log and log["skipped/cls"] == 1, f"cosines or the skipped task are missing: {log}")
        found = differences(output, outcome(whole))
        demand(not found, found)

    def kill(self, everyone: bool) -> None:
        output, moment = self.output(), self.moment()
        ranks = self.start(output)
        time.sleep(moment)
        ranks.send(signal.SIGKILL, *(() if everyone else (self.random.randrange(2),)))
        ranks.wait(grace=0.3)
        self.go_on(output)

    def kill_in_save(self, everyone: bool) -> None:
        output = self.output()
        self.whole()
        ranks = self.start(output)
        step = self.random.randrange(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
        scratch = output / f".unfinished-checkpoint-{step}"
        while ranks.alive() and not scratch.exists():
            time.sleep(0.0005)
        time.sleep(self.random.uniform(0, 0.06))
        before = last_step(output)
        ranks.send(signal.SIGKILL, *(() if everyone else (self.random.randrange(2),)))
        ranks.wait(grace=0.0)
        self.in_save += scratch.exists()
        demand(last_step(output) >= before, "a finished checkpoint is gone")
        self.go_on(output)

    def stop(self, number: int, everyone: bool) -> None:
        output, moment = self.output(), self.moment()
        ranks = self.start(output)
        while ranks.alive() and not (output / "log.jsonl").exists():  # training begins
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.6 * moment))
        ranks.send(number, *(() if everyone else (self.random.randrange(2),)))
        codes = ranks.wait()
        text = (output / "log.jsonl").read_text()
        if '"stopped"' not in text:  # it came after the last step
            demand(f"checkpoint-{STEPS}" in [p.name for p in checkpoints(output)], "nothing was saved", ranks)
        else:
            demand(set(codes.values()) == {75}, f"exit statuses {codes} instead of 75", ranks)
            event = json.loads(text.splitlines()[-1])
            demand(event["step"] == last_step(output), "the last step was not saved", ranks)
        self.go_on(output)

    def stop_with_workers(self) -> None:
        """As launchers do: the signal also goes to the processes that read data ahead."""
        output = self.output()
        self.whole()
        ranks = self.start(output, "trainer.dataloader_num_workers=1")
        ranks.wait_for_step(SAVE_STEPS)
        for rank in ranks.alive():
            for process in [*psutil.Process(ranks.pids[rank]).children(), psutil.Process(ranks.pids[rank])]:
                process.send_signal(signal.SIGTERM)
        codes = ranks.wait()
        demand(set(codes.values()) == {75}, f"exit statuses {codes} instead of 75", ranks)
        self.go_on(output)

    def cut(self, steps: Sequence[int]) -> None:
        """A run that begins anew at each of its steps."""
        every = self.output()
        ranks = self.start(every, "trainer.save_steps=1", f"trainer.save_total_limit={STEPS}")
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        if self.background:
            found = differences(every, self.whole())
            demand(not found, found)
        self.wholes.setdefault(self.stage, outcome(every))  # saving does not change a run
        for step in steps:
            output = self.output()
            shutil.copytree(every / f"checkpoint-{step}", output / f"checkpoint-{step}")
            self.go_on(output, "trainer.save_steps=1")

    def damage(self, flip: bool) -> None:
        output = self.output()
        self.whole()
        ranks = self.start(output)
        ranks.wait_for_step(self.random.randrange(2 * SAVE_STEPS, STEPS + 1, SAVE_STEPS))
        ranks.send(signal.SIGKILL)
        ranks.wait()
        last = checkpoints(output)[-1]
        file = self.random.choice(sorted(p for p in last.rglob("*") if p.is_file() and p.stat().st_size))
        content = bytearray(file.read_bytes())
        if flip:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        else:
            del content[self.random.randrange(len(content)) :]
        file.write_bytes(content)
        ranks = self.start(output, "--resume")
        demand(not any(ranks.wait().values()), "the run could not go on", ranks)
        demand(f"{last.name} is broken" in ranks.said(), f"nothing was said of {file}", ranks)
        demand((output / f"broken-{last.name}").is_dir(), "the broken checkpoint was not set aside")
        found = differences(output, self.whole())
        demand(not found, found)
        shutil.rmtree(output)

    def disk_full(self) -> None:
        output = self.output()
        self.whole()
        if not memory_disk(output, "4m"):
            raise NotPossible("a disk in memory cannot be mounted here (root is needed)")
        try:
            ranks = self.start(output, f"trainer.save_total_limit={STEPS}")
            codes = ranks.wait()
            demand(any(codes.values()), "the disk did not fill up", ranks)
            said = ranks.said()
            demand("could not be written" in said and "no space left" in said.lower(), "it was not said", ranks)
            demand("is untouched" in said and bool(checkpoints(output)), "no earlier checkpoint is left", ranks)
            demand(not list(output.glob(".unfinished*")), "the unfinished checkpoint was not deleted")
            bigger = ["mount", "-o", "remount,size=64m", str(output)]
            subprocess.run(bigger, check=True)
            ranks = self.start(output, "--resume")
            demand(not any(ranks.wait().values()), "the run could not go on", ranks)
            found = differences(output, self.whole())
            demand(not found, found)
        finally:
            subprocess.run(["umount", "--lazy", str(output)], check=True)

    def standstill(self, rank: int) -> None:
        output = self.output()
        self.whole()
        ranks = self.start(output, "trainer.stall_timeout=2")
        ranks.wait_for_step(SAVE_STEPS)
        ranks.send(signal.SIGSTOP, rank)
        begun = time.monotonic()
        ranks.wait(grace=0.5)
        demand(time.monotonic() - begun < 30, "it took too long", ranks)
        said = ranks.said()
        demand(f"rank {rank}" in said and "has not" in said and " step " in said, "it was not named", ranks)
        self.go_on(output)

    def nonfinite(self, policy: str, value: float, last: int = 3) -> None:
        output = self.output()

        def before(rank: int) -> None:
            spoil_loss(value, range(3, last + 1), rank)

        flags = (f"trainer.nonfinite={policy}", "trainer.nonfinite_limit=3", "trainer.save_steps=1")
        ranks = self.start(output, *flags, f"trainer.save_total_limit={STEPS}", before=before)
        codes = ranks.wait()
        said = ranks.said()
        if policy == "stop":
            demand(set(codes.values()) == {1} and "task 'cls' is not finite" in said, "it did not stop", ranks)
            self.go_on(output)
        elif last - 3 + 1 >= 3:
            demand(set(codes.values()) == {1} and "3 steps in a row" in said, "it did not stop", ranks)
        else:
            demand(not any(codes.values()), "the run failed", ranks)
            weights, history = outcome(output)
            demand(all(bool(torch.isfinite(v).all()) for v in weights.values()), "weights are not finite")
            counts = [entry["skipped/cls"] for entry in history if "skipped/cls" in entry]
            demand(counts[-1] == last - 2, f"skipped/cls is {counts}")
            earlier, later = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (3, last + 1))
            moved = {
                name.split(".")[1 if "tasks" in name else 0] for name in later if (earlier[name] != later[name]).any()
            }
            expected = set() if policy == "skip_step" else {"backbone", "det", "seg"}
            demand(moved == expected, f"the steps left out moved {moved} instead of {expected}")

    def memory(self) -> None:
        output = self.output()
        ranks = self.start(output, before=exhaust_memory)
        codes = ranks.wait()
        said = ranks.said()
        wanted = ("step 3, task 'cls', micro-step 1 of 1", "4 images of 32 x 32", "tasks.cls.batch_size")
        demand(any(codes.values()) and all(word in said for word in wanted), "it was not said", ranks)
        self.go_on(output)

    def data_gone(self) -> None:
        output = self.output()
        self.whole()
        data, away = self.home / "data" / "detection", self.home / "gone"
        ranks = self.start(output)
        ranks.wait_for_step(SAVE_STEPS)
        ranks.send(signal.SIGSTOP)
        data.rename(away)
        ranks.send(signal.SIGCONT)
        try:
            codes = ranks.wait()
        finally:
            away.rename(data)
        said = ranks.said()
        if any(codes.values()):
            demand("'det'" in said and "cannot be read" in said, "it was not said", ranks)
        self.go_on(output)

    def secrets(self) -> None:
        output = self.output()
        names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
        ranks = self.start(output, before=lambda rank: os.environ.update({n: "s3cr3t-4711" for n in names}))
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        for file in [*output.rglob("*"), ranks.log]:
            demand(not file.is_file() or b"s3cr3t-4711" not in file.read_bytes(), f"a secret is in {file}")

    def reads_no_data(self) -> None:
        output = self.output()
        self.whole()
        ranks = self.start(output)
        ranks.wait_for_step(STEPS - SAVE_STEPS)
        ranks.send(signal.SIGKILL)
        ranks.wait()
        first = last_step(output)
        reads = self.home / "reads"
        reads.unlink(missing_ok=True)
        ranks = self.start(output, "--resume", before=lambda rank: count_reads(reads))
        demand(not any(ranks.wait().values()), "the run could not go on", ranks)
        expected = (STEPS - first) * 2 * (2 * 2 + 2 + 4)  # ranks x images of a step
        found = len(reads.read_text().splitlines()) if reads.exists() else 0
        demand(found == expected, f"{found} samples were read, {expected} were needed")


# ---- faults inside of a rank ----


def allow_fp16(rank: int) -> None:
    """Let DeepSpeed take a CPU for fp16, and rank 0 say its loss scale after every step."""
    from deepspeed.accelerator import get_accelerator

    from allinone_ds.training.trainer import AllInOneTrainer

    get_accelerator().is_fp16_supported = lambda: True
    step = AllInOneTrainer._step

    def told(self, number):
        report = step(self, number)
        if rank == 0:
            print(f"loss scale {self.deepspeed.optimizer.loss_scale} after step {number}", flush=True)
        return report

    AllInOneTrainer._step = told


def write_late() -> None:
    """A checkpoint in the background is written after the step that follows it; at the end of a run after a second."""
    from allinone_ds.balance import TaskBalancer
    from allinone_ds.training.background import BackgroundSaver

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
    """The classification loss of rank 1 is `value` in these steps."""
    from allinone_ds.tasks.classification import ClassificationTask

    forward, calls = ClassificationTask.forward, iter(range(10**9))

    def spoilt(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.training and next(calls) in steps and rank == 1:
            out.loss = out.loss * value
        return out

    ClassificationTask.forward = spoilt


def exhaust_memory(rank: int) -> None:
    """The classification task of rank 1 runs out of memory in step 3."""
    from allinone_ds.tasks.classification import ClassificationTask

    forward, calls = ClassificationTask.forward, iter(range(10**9))

    def greedy(self, *args, **kwargs):
        if next(calls) == 3 and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **kwargs)

    ClassificationTask.forward = greedy


def count_reads(file: Path) -> None:
    """Every picture that is decoded adds a line to `file`."""
    from allinone_ds.data import classified, coco, label_maps

    for module in (classified, coco, label_maps):

        def counted(path, *args, _read=module.read_image, **kwargs):
            with file.open("a") as sink:
                sink.write(f"{path}\n")
            return _read(path, *args, **kwargs)

        module.read_image = counted


# ---- the table ----


def rows(bench: Bench, once: bool) -> Iterator[tuple[str, str, Callable[[], None]]]:
    steps = [LOGGING_STEPS + 2] if once else range(1, STEPS)
    how = "stopped between two logs" if once else f"stopped after each of its {STEPS} steps"
    yield CUT, how, lambda: bench.cut(steps)
    yield "run cut between two logs", "cosines measured, a task left out before it", bench.cut_between_logs
    yield "run cut, fp16 loss scale falling", "stopped after half of its steps, ZeRO-2", bench.cut_fp16
    yield "other ranks and ZeRO stage", "2 ranks ZeRO-2, 4 ranks ZeRO-2, 1 rank ZeRO-3", bench.reshard
    yield "kill -9 of one rank", "SIGKILL at a random moment", lambda: bench.kill(False)
    yield "kill -9 of all ranks", "SIGKILL at a random moment", lambda: bench.kill(True)
    yield "kill -9 of one rank in a save", "0-60 ms after the save began", lambda: bench.kill_in_save(False)
    yield "kill -9 of all ranks in a save", "0-60 ms after the save began", lambda: bench.kill_in_save(True)
    yield "SIGTERM to all ranks", "at a random moment of training", lambda: bench.stop(signal.SIGTERM, True)
    yield "SIGUSR1 to one rank", "at a random moment of training", lambda: bench.stop(signal.SIGUSR1, False)
    yield "SIGTERM to ranks and data workers", "in mid-run", bench.stop_with_workers
    yield "truncated checkpoint", "a random file of the last one cut", lambda: bench.damage(False)
    yield "bit flip in a checkpoint", "a random bit of a random file of the last one", lambda: bench.damage(True)
    yield "disk full while saving", "run folder on a 4 MiB disk in memory", bench.disk_full
    yield "rank 0 stops answering", "SIGSTOP, stall_timeout 2 s", lambda: bench.standstill(0)
    yield "rank 1 stops answering", "SIGSTOP, stall_timeout 2 s", lambda: bench.standstill(1)
    yield "NaN loss, skip_task", "one task, rank 1, one step", lambda: bench.nonfinite("skip_task", float("nan"))
    yield "inf loss, skip_step", "one task, rank 1, two steps", lambda: bench.nonfinite("skip_step", float("inf"), 4)
    yield "NaN loss, stop", "one task, rank 1, one step", lambda: bench.nonfinite("stop", float("nan"))
    yield "NaN loss for ever", "nonfinite_limit 3", lambda: bench.nonfinite("skip_task", float("nan"), STEPS)
    yield "out of memory", "torch.OutOfMemoryError in a micro-step of rank 1", bench.memory
    yield "data source vanishes", "its folder renamed in mid-run", bench.data_gone
    yield "secrets in the environment", "every written file searched for them", bench.secrets
    yield "resume reads old data", "samples read after a resume counted", bench.reads_no_data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100, help="random kills, signals and damages in all (100)")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--async", action="store_true", dest="background", help="save in the background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--once", action="store_true", help="every row once, with ZeRO-2; the first with all stages")
    parser.add_argument("--json", type=Path, help="write the table there too")
    args = parser.parse_args()
    import_everything()
    table: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), args.seed, args.background)
        chosen = [row for row in rows(bench, args.once) if any(word in row[0] for word in args.only)]
        tries = 0
        lucky = sum(any(word in row[0] for word in LUCKY) for row in chosen)
        for fault, how, attempt in chosen:
            row = Row(fault, how)
            table.append(row)
            random_moment = any(word in fault for word in LUCKY)
            times = max(1, round(args.times / lucky)) if random_moment else len(args.stages)
            if attempt in (bench.reshard, bench.cut_fp16):
                times = 1
            if args.once and fault != CUT:
                times = 1
            for _ in range(times):
                tries += 1
                bench.stage = args.stages[tries % len(args.stages)] if fault == CUT or not args.once else 2
                try:
                    attempt()
                    row.kept += 1
                except NotPossible as error:
                    row.notes.append(str(error))
                    break
                except (Lost, TimeoutError) as error:
                    row.notes.append(f"ZeRO-{bench.stage}: {error}")
                row.tried += 1
            print(f"| {row.fault} | {row.how} | {row.tried} | {row.kept} |", flush=True)
            for note in row.notes:
                print(f"    {note}", flush=True)
        if bench.in_save:
            print(f"(of the kills in a save, {bench.in_save} left an unfinished checkpoint behind)")
    if args.json:
        args.json.write_text(json.dumps([vars(row) for row in table], indent=1))
    return 0 if all(row.kept == row.tried for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
