"""One try of every other fault."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from bench import Bench, NotPossible, demand
from inside import allow_fp16, count_reads, exhaust_memory, score_by_step, spoil_loss
from ranks import LOGGING_STEPS, SAVE_STEPS, STEPS, Ranks, differences, last_step, memory_disk, outcome
from safetensors.torch import load_file

from allinone_ds.run_config.yaml_files import find_config
from allinone_ds.run_folder.checkpoints import checkpoints

NAN = float("nan")


class Tries(Bench):
    """One try of a fault is one method; it raises `Lost` when anything was lost, and returns how many tries it was
    when they were several."""

    def reshard(self) -> None:
        """2 ranks with ZeRO-2, then 4 ranks with ZeRO-2, then 1 rank with ZeRO-3: the losses of 2 ranks throughout, and
        the same averaged weights at the end.

        Both tasks are means over images, and ranks x batch size stays, so the same images give the same gradient.
        """
        content = yaml.safe_load(self.file.read_text())
        plain = {**content["tasks"]["cls"], "options": {}}
        content["tasks"] = {"one": plain, "two": plain}
        content["trainer"].update(logging_steps=1, save_total_limit=STEPS, ema_decay=0.9)
        file = self.home / "reshard.yaml"
        file.write_text(yaml.safe_dump(content))

        def start(output: Path, stage: int, world: int, *flags: str) -> Ranks:
            batches = [f"tasks.{task}.batch_size={4 // world}" for task in ("one", "two")]
            flags = (f"deepspeed=configs/deepspeed/zero{stage}.json", *batches, *flags)
            return self.started_with(file, output, *flags, world=world)

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
        average, last = load_file(whole / "ema" / "model.safetensors"), load_file(whole / "model.safetensors")
        found = load_file(output / "ema" / "model.safetensors")
        off = max(float((found[name] - value).abs().max()) for name, value in average.items())
        moved = max(float((last[name] - value).abs().max()) for name, value in average.items())
        demand(off < 1e-3 * moved, f"the averaged weights differ by {off:.1e}, of {moved:.1e} to the last ones")

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
            ranks = self.started_with(self.file, place, *flags, *resume, before=allow_fp16)
            demand(not any(ranks.wait().values()), "the run failed", ranks)
            scales.append([line for line in ranks.said().splitlines() if line.startswith("loss scale")])
            if place == whole:
                shutil.copytree(whole / f"checkpoint-{STEPS // 2}", output / f"checkpoint-{STEPS // 2}")
        demand(len(set(scales[0])) > 2, f"the loss scale hardly moved: {scales[0]}")
        demand(scales[1] == scales[0][STEPS // 2 :], f"other loss scales: {scales}")
        found = differences(outcome(output), outcome(whole))
        demand(not found, found)

    def stop(self, number: int, everyone: bool) -> None:
        output = self.output()
        self.whole()
        ranks = self.start(output)
        while ranks.alive() and not (output / "log.jsonl").exists():  # training begins
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, self.seconds[self.stage] - self.before[self.stage]))
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

    def cut(self, steps: Sequence[int]) -> int:
        """A run that begins anew at each of its steps."""
        every = self.output()
        ranks = self.start(every, "trainer.save_steps=1", f"trainer.save_total_limit={STEPS}")
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        self.compare(every)  # saving does not change a run
        for step in steps:
            output = self.output()
            shutil.copytree(every / f"checkpoint-{step}", output / f"checkpoint-{step}")
            self.go_on(output, "trainer.save_steps=1")
        return len(steps)

    def cut_between_logs(self) -> None:
        """Cosines that were measured before the cut are logged after it; a task left out before it stays counted."""
        flags = ("balancer.cosines_every=2", "trainer.save_steps=1", f"trainer.save_total_limit={STEPS}")
        whole, output = self.output(), self.output()
        ranks = self.start(whole, *flags, before=lambda rank: spoil_loss(NAN, range(1, 2), rank))
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        step = LOGGING_STEPS + 2  # the last measured step before the next log
        shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
        ranks = self.start(output, *flags, "--resume")
        demand(not any(ranks.wait().values()), "the run could not go on", ranks)
        log = [entry for entry in outcome(whole)[1] if "loss" in entry and entry["step"] > step][0]
        demand("cosine/det/seg" in log and log["skipped/cls"] == 1, f"cosines or the skipped task are missing: {log}")
        found = differences(outcome(output), outcome(whole))
        demand(not found, found)

    def keep_two(self) -> None:
        """trainer.save_total_limit deletes the oldest ones."""
        output = self.output()
        ranks = self.start(output)
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        kept = [path.name for path in checkpoints(output)]
        demand(kept == [f"checkpoint-{STEPS - SAVE_STEPS}", f"checkpoint-{STEPS}"], f"it kept {kept}")

    def best(self, strategy: str) -> None:
        """SIGTERM in the step after the best checkpoint, of which a save in the background is then still under way; the
        stopped run keeps the last checkpoint beside the best, goes on, and ends with the weights of the best."""
        content = yaml.safe_load(self.file.read_text())
        for task in content["tasks"].values():
            task["test"] = task["train"]
        content["trainer"].update(eval_strategy="steps", eval_steps=1, save_total_limit=1)
        file, output = self.home / "best.yaml", self.output()
        file.write_text(yaml.safe_dump(content))
        good = 2 * SAVE_STEPS
        scores = {step: 0.9 if step == good else 0.5 - step / 100 for step in range(1, STEPS + 1)}
        whole = self.whole(good)
        flags = (f"trainer.save_strategy={strategy}", "trainer.load_best_model_at_end=true")
        before = lambda rank: score_by_step(scores, good + 1, rank)  # noqa: E731
        ranks = self.start(output, *flags, before=before, file=file)
        codes = ranks.wait()
        demand(set(codes.values()) == {75}, f"exit statuses {codes} instead of 75", ranks)
        kept = [path.name for path in checkpoints(output)]
        demand(kept == [f"checkpoint-{good}", f"checkpoint-{good + 1}"], f"after SIGTERM it kept {kept}", ranks)
        moved = output.with_name(f"{output.name}-moved")
        output.rename(moved)
        before = lambda rank: score_by_step(scores, None, rank)  # noqa: E731
        ranks = self.start(moved, *flags, "trainer.save_total_limit=2", "--resume", before=before, file=file)
        demand(not any(ranks.wait().values()), "the run could not go on", ranks)
        kept = [path.name for path in checkpoints(moved)]
        last = good + 1 if strategy == "best" else STEPS
        demand(kept == [f"checkpoint-{good}", f"checkpoint-{last}"], f"at the end it kept {kept}", ranks)
        metrics = json.loads((moved / "metrics.json").read_text())
        demand(metrics["best_step"] == good and metrics["eval_score"] == 0.9, f"the metrics are {metrics}")
        final = load_file(moved / "model.safetensors")
        wrong = [name for name, value in whole[0].items() if not torch.equal(final[name], value)]
        demand(not wrong, f"the weights at the end are not those of the best checkpoint: {wrong[:3]}")

    def twice(self) -> None:
        """A second start in the folder of a run that goes on is refused; the first ends as if nothing had happened."""
        output = self.output()
        self.whole()
        ranks = self.start(output)
        ranks.wait_for_step(SAVE_STEPS)
        ranks.send(signal.SIGSTOP)
        second = self.start(output, "--resume")
        codes = second.wait()
        ranks.send(signal.SIGCONT)
        demand(set(codes.values()) == {2}, f"exit statuses {codes} of the second run instead of 2", second)
        said = f"process {ranks.pids[0]} on "
        demand(said in second.said(), f"'{said}' was not said", second)
        demand(not any(ranks.wait().values()), "the first run failed", ranks)
        self.compare(output)

    def other_model(self, change: Callable[[dict[str, Any]], None], words: str) -> None:
        """A resume with other tasks or heads is refused with the reason."""
        output = self.output()
        ranks = self.start(output, f"trainer.max_steps={SAVE_STEPS}")
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        content = yaml.safe_load(self.file.read_text())
        change(content["tasks"])
        file = self.home / "changed.yaml"
        file.write_text(yaml.safe_dump(content))
        ranks = self.start(output, "--resume", file=file)
        codes = ranks.wait()
        demand(set(codes.values()) == {2} and words in ranks.said(), f"exit statuses {codes}; not said: {words}", ranks)
        demand([path.name for path in checkpoints(output)] == [f"checkpoint-{SAVE_STEPS}"], "the checkpoint is gone")

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
        self.compare(output)
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
            demand("is unchanged" in said and bool(checkpoints(output)), "no earlier checkpoint is left", ranks)
            demand(not list(output.glob(".unfinished*")), "the unfinished checkpoint was not deleted")
            bigger = ["mount", "-o", "remount,size=64m", str(output)]
            subprocess.run(bigger, check=True)
            ranks = self.start(output, "--resume")
            demand(not any(ranks.wait().values()), "the run could not go on", ranks)
            self.compare(output)
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

    def suspended(self) -> None:
        """All ranks are stopped for longer than the timeout, and continued: nothing has happened."""
        output = self.output()
        self.whole()
        ranks = self.start(output, "trainer.stall_timeout=2")
        ranks.wait_for_step(SAVE_STEPS)
        ranks.send(signal.SIGSTOP)
        time.sleep(5)
        ranks.send(signal.SIGCONT)
        demand(not any(ranks.wait().values()), "the run failed", ranks)
        self.compare(output)

    def nonfinite(self, policy: str, value: float, last: int = 3) -> None:
        """The classification loss of rank 1 is `value` from step 4 (the fourth) on, in `last` - 2 steps."""
        output = self.output()

        def before(rank: int) -> None:
            spoil_loss(value, range(3, last + 1), rank)

        flags = (f"trainer.nonfinite={policy}", "trainer.nonfinite_limit=3", "trainer.save_steps=1")
        ranks = self.start(output, *flags, f"trainer.save_total_limit={STEPS}", before=before)
        codes = ranks.wait()
        said = ranks.said()
        for folder in checkpoints(output):
            weights = load_file(folder / "model.safetensors")
            demand(all(bool(torch.isfinite(v).all()) for v in weights.values()), f"{folder.name} is not finite")
        if policy == "stop" or last - 2 >= 3:
            what = "task 'cls' is not finite" if policy == "stop" else "3 steps in a row"
            demand(set(codes.values()) == {1} and what in said and "'cls'" in said, "it did not stop", ranks)
            for folder in checkpoints(output)[3:]:  # of the steps that left something out
                shutil.rmtree(folder)
            self.go_on(output)
            return
        demand(not any(codes.values()), "the run failed", ranks)
        counts = [entry["skipped/cls"] for entry in outcome(output)[1] if "skipped/cls" in entry]
        demand(counts[-1] == last - 2, f"skipped/cls is {counts}")
        earlier, later = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (3, last + 1))
        moved = {name.split(".")[1 if "tasks" in name else 0] for name in later if (earlier[name] != later[name]).any()}
        expected = set() if policy == "skip_step" else {"backbone", "det", "seg"}
        demand(moved == expected, f"the steps left out moved {moved} instead of {expected}")

    def memory(self, by_hand: bool) -> None:
        output = self.output()
        ranks = self.start(output, before=lambda rank: exhaust_memory(rank, by_hand))
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
