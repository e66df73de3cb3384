"""One try of each fault other than the repeated kills of `kills.py`."""

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
from safetensors.torch import load_file

from allinone_ds.run_config.yaml_files import find_config
from allinone_ds.run_folder.checkpoints import checkpoints
from benchmarks.common.forked_run import LOGGING_STEPS, SAVE_STEPS, STEPS, Ranks, last_step
from benchmarks.faults.bench import Bench, NotPossible, mount_memory_disk, require
from benchmarks.faults.inject import allow_fp16, count_reads, exhaust_memory, score_by_step, spoil_loss
from benchmarks.faults.outcome import differences, outcome

NAN = float("nan")


class Tries(Bench):
    """Each method makes one try of a fault. It raises `Lost` if anything was lost and returns the number of tries if it
    made several."""

    def reshard(self) -> None:
        """Continue a run of 2 ranks with ZeRO-2 on 4 ranks with ZeRO-2, then on 1 rank with ZeRO-3.

        Losses and averaged weights must equal those of a run on 2 ranks throughout. Both tasks are means over images
        and ranks x batch size is constant, so the same images give the same gradient.
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
            return self.start_ranks(file, output, *flags, world=world)

        unbroken, output = self.new_output(), self.new_output()
        ranks = start(unbroken, 2, 2)
        require(not any(ranks.wait().values()), "the run failed", ranks)
        shutil.copytree(unbroken / f"checkpoint-{SAVE_STEPS}", output / f"checkpoint-{SAVE_STEPS}")
        ranks = start(output, 2, 4, "--resume")
        ranks.wait_for_step(2 * SAVE_STEPS)
        ranks.send(signal.SIGKILL)
        ranks.wait()
        require(2 * SAVE_STEPS <= last_step(output) < STEPS, "4 ranks saved no checkpoint before the last step", ranks)
        ranks = start(output, 3, 1, "--resume")
        require(not any(ranks.wait().values()), "the run could not be resumed on 1 rank", ranks)
        wanted, found = ([e["loss"] for e in outcome(o)[1] if "loss" in e] for o in (unbroken, output))
        off = max(abs(a - b) for a, b in zip(wanted, found, strict=True))
        require(off < 5e-6 * max(wanted), f"the losses differ by {off:.1e}")
        average, last = (load_file(unbroken / name / "model.safetensors") for name in ("ema", "."))
        found = load_file(output / "ema" / "model.safetensors")
        off = max(float((found[name] - value).abs().max()) for name, value in average.items())
        moved = max(float((last[name] - value).abs().max()) for name, value in average.items())
        require(off < 1e-3 * moved, f"the averaged weights differ by {off:.1e}, and by {moved:.1e} from the last")

    def cut_fp16(self) -> None:
        """Resume in fp16 and require the same loss scales, which fall in most of these steps."""
        content = json.loads(find_config("configs/deepspeed/zero2.json").read_text())
        content.pop("bf16")
        content["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}
        file = self.home / "fp16.json"
        file.write_text(json.dumps(content))
        flags = (f"deepspeed={file}", "trainer.fp16=true", f"trainer.save_total_limit={STEPS}")
        unbroken, output = self.new_output(), self.new_output()
        scales: list[list[str]] = []
        for folder in (unbroken, output):
            resume = ["--resume"] if folder == output else []
            ranks = self.start_ranks(self.file, folder, *flags, *resume, before=allow_fp16)
            require(not any(ranks.wait().values()), "the run failed", ranks)
            scales.append([line for line in ranks.printed().splitlines() if line.startswith("loss scale")])
            if folder == unbroken:
                shutil.copytree(unbroken / f"checkpoint-{STEPS // 2}", output / f"checkpoint-{STEPS // 2}")
        require(len(set(scales[0])) > 2, f"the loss scale has at most 2 values: {scales[0]}")
        require(scales[1] == scales[0][STEPS // 2 :], f"the loss scales differ: {scales}")
        found = differences(outcome(output), outcome(unbroken))
        require(not found, found)

    def stop(self, number: int, everyone: bool) -> None:
        """Send a signal to all ranks, or to one, at a random moment of training; the run must save and end with 75."""
        output = self.new_output()
        self.unbroken()
        ranks = self.start(output)
        while ranks.alive() and not (output / "log.jsonl").exists():  # until training begins
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, self.seconds[self.stage] - self.before[self.stage]))
        ranks.send(number, *(() if everyone else (self.random.randrange(2),)))
        codes = ranks.wait()
        text = (output / "log.jsonl").read_text()
        if '"stopped"' not in text:  # the signal came after the last step
            require(f"checkpoint-{STEPS}" in [p.name for p in checkpoints(output)], "no checkpoint was saved", ranks)
        else:
            require(set(codes.values()) == {75}, f"exit statuses {codes} instead of 75", ranks)
            event = json.loads(text.splitlines()[-1])
            require(event["step"] == last_step(output), "the last step was not saved", ranks)
        self.resume_to_end(output)

    def stop_with_workers(self) -> None:
        """Send SIGTERM to the ranks and to the data workers, as launchers do."""
        output = self.new_output()
        self.unbroken()
        ranks = self.start(output, "trainer.dataloader_num_workers=1")
        ranks.wait_for_step(SAVE_STEPS)
        for rank in ranks.alive():
            for process in [*psutil.Process(ranks.pids[rank]).children(), psutil.Process(ranks.pids[rank])]:
                process.send_signal(signal.SIGTERM)
        codes = ranks.wait()
        require(set(codes.values()) == {75}, f"exit statuses {codes} instead of 75", ranks)
        self.resume_to_end(output)

    def cut(self, steps: Sequence[int]) -> int:
        """Stop a run after each of these steps and resume it to its end."""
        all_steps = self.new_output()
        ranks = self.start(all_steps, "trainer.save_steps=1", f"trainer.save_total_limit={STEPS}")
        require(not any(ranks.wait().values()), "the run failed", ranks)
        self.compare(all_steps)  # saving must not change a run
        for step in steps:
            output = self.new_output()
            shutil.copytree(all_steps / f"checkpoint-{step}", output / f"checkpoint-{step}")
            self.resume_to_end(output, "trainer.save_steps=1")
        return len(steps)

    def cut_between_logs(self) -> None:
        """Resume between two logs; cosines measured and tasks skipped before the stop must be in the next log."""
        flags = ("balancer.cosines_every=2", "trainer.save_steps=1", f"trainer.save_total_limit={STEPS}")
        unbroken, output = self.new_output(), self.new_output()
        ranks = self.start(unbroken, *flags, before=lambda rank: spoil_loss(NAN, range(1, 2), rank))
        require(not any(ranks.wait().values()), "the run failed", ranks)
        step = LOGGING_STEPS + 2  # the last measured step before the next log
        shutil.copytree(unbroken / f"checkpoint-{step}", output / f"checkpoint-{step}")
        ranks = self.start(output, *flags, "--resume")
        require(not any(ranks.wait().values()), "the run could not be resumed", ranks)
        log = [entry for entry in outcome(unbroken)[1] if "loss" in entry and entry["step"] > step][0]
        require("cosine/det/seg" in log and log["skipped/cls"] == 1, f"no cosines or no skipped task in {log}")
        found = differences(outcome(output), outcome(unbroken))
        require(not found, found)

    def keep_two(self) -> None:
        """Require that trainer.save_total_limit=2 deletes all but the last two checkpoints."""
        output = self.new_output()
        ranks = self.start(output)
        require(not any(ranks.wait().values()), "the run failed", ranks)
        kept = [path.name for path in checkpoints(output)]
        require(kept == [f"checkpoint-{STEPS - SAVE_STEPS}", f"checkpoint-{STEPS}"], f"the run kept {kept}")

    def best(self, strategy: str) -> None:
        """Send SIGTERM in the step after the best checkpoint, whose background save is then still running.

        The stopped run must keep the last checkpoint beside the best one, resume, and end with the weights of the best.
        """
        content = yaml.safe_load(self.file.read_text())
        for task in content["tasks"].values():
            names = {key: value for key, value in task["train"].items() if isinstance(value, str)}
            task["test"] = {**task["train"], **{key: value.replace("train", "test") for key, value in names.items()}}
        content["trainer"].update(eval_strategy="steps", eval_steps=1, save_total_limit=1)
        file, output = self.home / "best.yaml", self.new_output()
        file.write_text(yaml.safe_dump(content))
        good = 2 * SAVE_STEPS
        scores = {step: 0.9 if step == good else 0.5 - step / 100 for step in range(1, STEPS + 1)}
        best = self.unbroken(good)
        flags = (f"trainer.save_strategy={strategy}", "trainer.load_best_model_at_end=true")
        before = lambda rank: score_by_step(scores, good + 1, rank)  # noqa: E731
        ranks = self.start(output, *flags, before=before, file=file)
        codes = ranks.wait()
        require(set(codes.values()) == {75}, f"exit statuses {codes} instead of 75", ranks)
        kept = [path.name for path in checkpoints(output)]
        require(kept == [f"checkpoint-{good}", f"checkpoint-{good + 1}"], f"after SIGTERM the run kept {kept}", ranks)
        moved = output.with_name(f"{output.name}-moved")
        output.rename(moved)
        before = lambda rank: score_by_step(scores, None, rank)  # noqa: E731
        ranks = self.start(moved, *flags, "trainer.save_total_limit=2", "--resume", before=before, file=file)
        require(not any(ranks.wait().values()), "the run could not be resumed", ranks)
        kept = [path.name for path in checkpoints(moved)]
        last = good + 1 if strategy == "best" else STEPS
        require(kept == [f"checkpoint-{good}", f"checkpoint-{last}"], f"at its end the run kept {kept}", ranks)
        metrics = json.loads((moved / "metrics.json").read_text())
        require(metrics["best_step"] == good and metrics["eval_score"] == 0.9, f"the metrics are {metrics}")
        final = load_file(moved / "model.safetensors")
        wrong = [name for name, value in best[0].items() if not torch.equal(final[name], value)]
        require(not wrong, f"the weights at the end are not those of the best checkpoint: {wrong[:3]}")

    def twice(self) -> None:
        """Start a second run in the folder of a running one; it must be refused and must not affect the first run."""
        output = self.new_output()
        self.unbroken()
        ranks = self.start(output)
        ranks.wait_for_step(SAVE_STEPS)
        ranks.send(signal.SIGSTOP)
        second = self.start(output, "--resume")
        codes = second.wait()
        ranks.send(signal.SIGCONT)
        require(set(codes.values()) == {2}, f"exit statuses {codes} of the second run instead of 2", second)
        holder = f"process {ranks.pids[0]} on "
        require(holder in second.printed(), f"'{holder}' was not printed", second)
        require(not any(ranks.wait().values()), "the first run failed", ranks)
        self.compare(output)

    def other_model(self, change: Callable[[dict[str, Any]], Any], words: str, status: int) -> None:
        """Resume with different tasks or heads.

        Args:
            change: of the tasks in the run's file.
            words: that must be printed.
            status: with which the run must end: 2, and the checkpoint is kept; or 0, at its last step.
        """
        output = self.new_output()
        ranks = self.start(output, f"trainer.max_steps={SAVE_STEPS}")
        require(not any(ranks.wait().values()), "the run failed", ranks)
        content = yaml.safe_load(self.file.read_text())
        change(content["tasks"])
        file = self.home / "changed.yaml"
        file.write_text(yaml.safe_dump(content))
        ranks = self.start(output, "--resume", file=file)
        codes = ranks.wait()
        require(
            set(codes.values()) == {status} and words in ranks.printed(),
            f"exit statuses {codes}; not printed: {words}",
            ranks,
        )
        last = SAVE_STEPS if status else STEPS
        require(last_step(output) == last, f"the last checkpoint is of step {last_step(output)}, not {last}")

    def damage(self, flip: bool) -> None:
        """Truncate a file of the last checkpoint or flip one bit of it; the run must resume from the one before."""
        output = self.new_output()
        self.unbroken()
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
        require(not any(ranks.wait().values()), "the run could not be resumed", ranks)
        require(f"{last.name} is broken" in ranks.printed(), f"the run did not report {file}", ranks)
        require((output / f"broken-{last.name}").is_dir(), "the broken checkpoint was not set aside")
        self.compare(output)
        shutil.rmtree(output)

    def disk_full(self) -> None:
        """Fill the disk while saving; the run must report it, keep the last checkpoint, and resume with more space."""
        output = self.new_output()
        self.unbroken()
        if not mount_memory_disk(output, "4m"):
            raise NotPossible("a disk in memory cannot be mounted here (root is needed)")
        try:
            ranks = self.start(output, f"trainer.save_total_limit={STEPS}")
            codes = ranks.wait()
            require(any(codes.values()), "the disk did not fill up", ranks)
            text = ranks.printed()
            require("could not be written" in text and "no space left" in text.lower(), "not reported", ranks)
            require("is unchanged" in text and bool(checkpoints(output)), "no earlier checkpoint is left", ranks)
            require(not list(output.glob(".unfinished*")), "the unfinished checkpoint was not deleted")
            bigger = ["mount", "-o", "remount,size=64m", str(output)]
            subprocess.run(bigger, check=True)
            ranks = self.start(output, "--resume")
            require(not any(ranks.wait().values()), "the run could not be resumed", ranks)
            self.compare(output)
        finally:
            subprocess.run(["umount", "--lazy", str(output)], check=True)

    def standstill(self, rank: int) -> None:
        """Stop one rank; the others must name it and end within 30 seconds."""
        output = self.new_output()
        self.unbroken()
        ranks = self.start(output, "trainer.stall_timeout=2")
        ranks.wait_for_step(SAVE_STEPS)
        ranks.send(signal.SIGSTOP, rank)
        begun = time.monotonic()
        ranks.wait(grace=0.5)
        require(time.monotonic() - begun < 30, "the ranks took longer than 30 s to end", ranks)
        text = ranks.printed()
        require(f"rank {rank}" in text and "has not" in text and " step " in text, "the rank was not named", ranks)
        self.resume_to_end(output)

    def suspended(self) -> None:
        """Stop all ranks for longer than the timeout and continue them; the run must not be affected."""
        output = self.new_output()
        self.unbroken()
        ranks = self.start(output, "trainer.stall_timeout=2")
        ranks.wait_for_step(SAVE_STEPS)
        ranks.send(signal.SIGSTOP)
        time.sleep(5)
        ranks.send(signal.SIGCONT)
        require(not any(ranks.wait().values()), "the run failed", ranks)
        self.compare(output)

    def nonfinite(self, policy: str, value: float, last: int = 3) -> None:
        """Multiply the classification loss of rank 1 by a value in `last` - 2 steps, the first of which is step 4."""
        output = self.new_output()

        def before(rank: int) -> None:
            spoil_loss(value, range(3, last + 1), rank)

        flags = (f"trainer.nonfinite={policy}", "trainer.nonfinite_limit=3", "trainer.save_steps=1")
        ranks = self.start(output, *flags, f"trainer.save_total_limit={STEPS}", before=before)
        codes = ranks.wait()
        text = ranks.printed()
        for folder in checkpoints(output):
            weights = load_file(folder / "model.safetensors")
            require(
                all(bool(torch.isfinite(v).all()) for v in weights.values()),
                f"{folder.name} has weights that are not finite",
            )
        if policy == "stop" or last - 2 >= 3:
            what = "task 'cls' is not finite" if policy == "stop" else "3 steps in a row"
            require(set(codes.values()) == {1} and what in text and "'cls'" in text, "the run did not stop", ranks)
            for folder in checkpoints(output)[3:]:  # of the steps that skipped the task or the update
                shutil.rmtree(folder)
            self.resume_to_end(output)
            return
        require(not any(codes.values()), "the run failed", ranks)
        counts = [entry["skipped/cls"] for entry in outcome(output)[1] if "skipped/cls" in entry]
        require(counts[-1] == last - 2, f"skipped/cls is {counts}")
        earlier, later = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (3, last + 1))
        moved = {name.split(".")[1 if "tasks" in name else 0] for name in later if (earlier[name] != later[name]).any()}
        expected = set() if policy == "skip_step" else {"backbone", "det", "seg"}
        require(moved == expected, f"the skipped steps changed {moved} instead of {expected}")

    def memory(self, by_hand: bool) -> None:
        """Let a rank run out of memory; the run must name step, task, micro-step and batch, and resume."""
        output = self.new_output()
        ranks = self.start(output, before=lambda rank: exhaust_memory(rank, by_hand))
        codes = ranks.wait()
        text = ranks.printed()
        wanted = ("step 3, task 'cls', micro-step 1 of 1", "4 images of 32 x 32", "tasks.cls.batch_size")
        require(any(codes.values()) and all(word in text for word in wanted), "not reported", ranks)
        self.resume_to_end(output)

    def data_gone(self) -> None:
        """Rename a data folder while the run is stopped; the run must name the task or finish, and resume."""
        output = self.new_output()
        self.unbroken()
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
        text = ranks.printed()
        if any(codes.values()):
            require("'det'" in text and "cannot be read" in text, "not reported", ranks)
        self.resume_to_end(output)

    def secrets(self) -> None:
        """Require that no file of a run contains a secret of its environment."""
        output = self.new_output()
        names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
        ranks = self.start(output, before=lambda rank: os.environ.update({n: "s3cr3t-4711" for n in names}))
        require(not any(ranks.wait().values()), "the run failed", ranks)
        for file in [*output.rglob("*"), ranks.log]:
            require(not file.is_file() or b"s3cr3t-4711" not in file.read_bytes(), f"a secret is in {file}")

    def reads_no_data(self) -> None:
        """Require that a resumed run reads the samples of the remaining steps, and no others."""
        output = self.new_output()
        self.unbroken()
        ranks = self.start(output)
        ranks.wait_for_step(STEPS - SAVE_STEPS)
        ranks.send(signal.SIGKILL)
        ranks.wait()
        first = last_step(output)
        reads = self.home / "reads"
        reads.unlink(missing_ok=True)
        ranks = self.start(output, "--resume", before=lambda rank: count_reads(reads))
        require(not any(ranks.wait().values()), "the run could not be resumed", ranks)
        expected = (STEPS - first) * 2 * (2 * 2 + 2 + 4)  # ranks x images per step
        found = len(reads.read_text().splitlines()) if reads.exists() else 0
        require(found == expected, f"{found} samples were read, {expected} were needed")
