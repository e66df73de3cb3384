"""What every try needs: runs in folders of their own, the unbroken run to compare with, and the verdict."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from allinone_ds.run_folder.checkpoints import checkpoints
from benchmarks.common.forked_run import SAVE_STEPS, STEPS, Ranks, last_step, make_run
from benchmarks.faults.inject import write_late
from benchmarks.faults.outcome import Outcome, differences, outcome


class Lost(Exception):
    """A run lost something, or did not report what had happened.

    Attributes:
        tries: number of tries of the fault that failed with it.
    """

    tries = 1


class NotPossible(Exception):
    """The fault cannot be injected on this machine."""


def require(holds: bool, otherwise: str, ranks: Ranks | None = None) -> None:
    """Raise `Lost` with this text, and the end of what the ranks printed, unless the condition holds."""
    if not holds:
        raise Lost(otherwise + (f"; the ranks printed:\n{ranks.printed()[-2500:]}" if ranks else ""))


class Bench:
    """Starts runs and compares them with the unbroken run of each ZeRO stage.

    Args:
        home: an empty folder.
        background: write checkpoints while training continues; the unbroken run saves in the step.

    Attributes:
        stage: ZeRO stage of the runs that are started.
        random: generator of the moments at which faults occur.
        in_save: kills that left an unfinished checkpoint.
    """

    def __init__(self, home: Path, background: bool = False) -> None:
        self.home = home
        self.background = background
        self.file = make_run(home)
        self.random = random.Random()
        self.stage = 1
        self.count = 0
        self.in_save = 0
        self.started: list[Ranks] = []
        self.outcomes: dict[int, dict[int, Outcome]] = {}
        self.before: dict[int, float] = {}  # stage -> seconds from the start to the first step
        self.seconds: dict[int, float] = {}  # stage -> seconds of the unbroken run
        self.saving: dict[int, float] = {}  # stage -> seconds of one save

    def start(
        self, output: Path, *overrides: str, before: Callable[[int], None] | None = None, file: Path | None = None
    ) -> Ranks:
        """Start a run on 2 ranks with the current stage and way of saving."""
        file = self.file if file is None else file
        if not self.background:
            return self.start_ranks(file, output, self.engine(), *overrides, before=before)

        def before_both(rank: int) -> None:
            write_late()
            if before is not None:
                before(rank)

        flags = (self.engine(), "trainer.async_save=true")
        return self.start_ranks(file, output, *flags, *overrides, before=before_both)

    def engine(self) -> str:
        """Return the override that selects the current ZeRO stage."""
        return f"deepspeed=configs/deepspeed/zero{self.stage}.json"

    def start_ranks(
        self,
        file: Path,
        output: Path,
        *overrides: str,
        world: int = 2,
        before: Callable[[int], None] | None = None,
    ) -> Ranks:
        """Start a run with exactly these overrides; `close` ends it if it still runs."""
        ranks = Ranks(file, output, *overrides, world=world, before=before)
        self.started = [*(earlier for earlier in self.started if earlier.alive()), ranks]
        return ranks

    def start_or_resume(self, output: Path, *overrides: str) -> Ranks:
        """Resume a run from its last checkpoint, or start it if it has none."""
        return self.start(output, *(["--resume"] if checkpoints(output) else []), *overrides)

    def close(self) -> None:
        """Kill all ranks that have not ended."""
        for ranks in self.started:
            ranks.kill()

    def new_output(self) -> Path:
        """Return the path of a folder that no run has used."""
        self.count += 1
        return self.home / f"run{self.count}"

    def unbroken(self, step: int = STEPS) -> Outcome:
        """Return the outcome of the unbroken run of this stage after a step; train it on the first call."""
        if self.stage not in self.outcomes:
            output = self.new_output()
            begun = time.monotonic()
            ranks = self.start_ranks(self.file, output, self.engine(), f"trainer.save_total_limit={STEPS}")
            saves = 0.0
            while ranks.alive():
                now = time.monotonic()
                if (output / "log.jsonl").exists():
                    self.before.setdefault(self.stage, now - begun)
                time.sleep(0.002)
                saves += (time.monotonic() - now) * any(output.glob(".unfinished-checkpoint-*"))
            require(not any(ranks.codes.values()), "the unbroken run failed", ranks)
            self.seconds[self.stage] = time.monotonic() - begun
            steps = range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
            self.saving[self.stage] = saves / len(steps)
            self.outcomes[self.stage] = {step: outcome(output, step) for step in steps}
        return self.outcomes[self.stage][step]

    def compare(self, output: Path, step: int = STEPS) -> None:
        """Require that the outcome of a run after a step equals that of the unbroken run."""
        found = differences(outcome(output, step), self.unbroken(step))
        require(not found, f"after step {step}: {found}")

    def resume_to_end(self, output: Path, *overrides: str) -> None:
        """Resume a run, require that it starts at its last checkpoint, and compare it with the unbroken run."""
        last = last_step(output)
        ranks = self.start_or_resume(output, *overrides)
        require(not any(ranks.wait().values()), "the run could not be resumed", ranks)
        events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        begun = [event["step"] for event in events if event["event"] == "begin"]
        require(begun[-1] == last, f"the run resumed from step {begun[-1]}, its last checkpoint was of step {last}")
        self.compare(output)
        require(not list(output.glob(".unfinished*")), "an unfinished checkpoint was not deleted")
        shutil.rmtree(output)
        ranks.log.unlink()

    def came_too_late(self) -> None:
        """Shorten the expected times: a run ended before its moment, as the machine was busier for the unbroken run."""
        self.before[self.stage] *= 0.7
        self.seconds[self.stage] *= 0.7

    def moment(self, from_step: int = 0) -> float:
        """Return a random moment of a run that begins at a step, in seconds after its start."""
        self.unbroken()
        before, total = self.before[self.stage], self.seconds[self.stage]
        return self.random.uniform(0.2 * before, before + (total - before) * (STEPS - from_step) / STEPS)


def mount_memory_disk(folder: Path, size: str) -> bool:
    """Mount a small disk in memory on a folder; return False where that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False
