"""What every try needs: runs in a folder of their own, the unbroken run to compare with, and a verdict."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from inside import write_late
from ranks import SAVE_STEPS, STEPS, Outcome, Ranks, differences, last_step, make_home, outcome

from allinone_ds.run_folder.checkpoints import checkpoints


class Lost(Exception):
    """Something was lost, or the run did not say what happened.

    Attributes:
        tries: how many tries of the fault are lost with it.
    """

    tries = 1


class NotPossible(Exception):
    """The fault cannot be injected on this machine."""


def demand(holds: bool, what: str, ranks: Ranks | None = None) -> None:
    if not holds:
        raise Lost(what + (f"; the ranks said:\n{ranks.said()[-2500:]}" if ranks else ""))


class Bench:
    """Starts runs, and knows how the unbroken one of each ZeRO stage went.

    Args:
        home: an empty folder.
        background: checkpoints are written while training goes on; the unbroken run saves in the step.

    Attributes:
        stage: ZeRO stage of the runs that are started.
        random: of the moments at which faults strike.
    """

    def __init__(self, home: Path, background: bool = False) -> None:
        self.home = home
        self.background = background
        self.file = make_home(home)
        self.random = random.Random()
        self.stage = 1
        self.count = 0
        self.in_save = 0
        self.started: list[Ranks] = []
        self.wholes: dict[int, dict[int, Outcome]] = {}
        self.before: dict[int, float] = {}  # seconds from the start to the first step, by stage
        self.seconds: dict[int, float] = {}  # of the whole run
        self.saving: dict[int, float] = {}  # of one save

    def start(
        self, output: Path, *overrides: str, before: Callable[[int], None] | None = None, file: Path | None = None
    ) -> Ranks:
        file = self.file if file is None else file
        if not self.background:
            return self.started_with(file, output, self.engine(), *overrides, before=before)

        def before_both(rank: int) -> None:
            write_late()
            if before is not None:
                before(rank)

        flags = (self.engine(), "trainer.async_save=true")
        return self.started_with(file, output, *flags, *overrides, before=before_both)

    def engine(self) -> str:
        return f"deepspeed=configs/deepspeed/zero{self.stage}.json"

    def started_with(
        self,
        file: Path,
        output: Path,
        *overrides: str,
        world: int = 2,
        before: Callable[[int], None] | None = None,
    ) -> Ranks:
        ranks = Ranks(file, output, *overrides, world=world, before=before)
        self.started = [*(earlier for earlier in self.started if earlier.alive()), ranks]
        return ranks

    def resumed(self, output: Path, *overrides: str) -> Ranks:
        """Start a run that goes on from its last checkpoint, from the beginning when nothing was saved yet."""
        return self.start(output, *(["--resume"] if checkpoints(output) else []), *overrides)

    def close(self) -> None:
        """End what still runs."""
        for ranks in self.started:
            ranks.end()

    def output(self) -> Path:
        self.count += 1
        return self.home / f"run{self.count}"

    def whole(self, step: int = STEPS) -> Outcome:
        """Outcome of the unbroken run of this stage after a step."""
        if self.stage not in self.wholes:
            output = self.output()
            begun = time.monotonic()
            ranks = self.started_with(self.file, output, self.engine(), f"trainer.save_total_limit={STEPS}")
            saves = 0.0
            while ranks.alive():
                now = time.monotonic()
                if (output / "log.jsonl").exists():
                    self.before.setdefault(self.stage, now - begun)
                time.sleep(0.002)
                saves += (time.monotonic() - now) * any(output.glob(".unfinished-checkpoint-*"))
            demand(not any(ranks.codes.values()), "the unbroken run failed", ranks)
            self.seconds[self.stage] = time.monotonic() - begun
            steps = range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
            self.saving[self.stage] = saves / len(steps)
            self.wholes[self.stage] = {step: outcome(output, step) for step in steps}
        return self.wholes[self.stage][step]

    def compare(self, output: Path, step: int = STEPS) -> None:
        found = differences(outcome(output, step), self.whole(step))
        demand(not found, f"after step {step}: {found}")

    def go_on(self, output: Path, *overrides: str) -> None:
        """Resume to the end, see that it began at the last checkpoint, and compare."""
        last = last_step(output)
        ranks = self.resumed(output, *overrides)
        demand(not any(ranks.wait().values()), "the run could not go on", ranks)
        events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        begun = [event["step"] for event in events if event["event"] == "begin"]
        demand(begun[-1] == last, f"the run went on from step {begun[-1]}, its last checkpoint was of step {last}")
        self.compare(output)
        demand(not list(output.glob(".unfinished*")), "an unfinished checkpoint was left")
        shutil.rmtree(output)
        ranks.log.unlink()

    def came_too_late(self) -> None:
        """A run ended before its moment: the machine was busier when the unbroken run was timed."""
        self.before[self.stage] *= 0.7
        self.seconds[self.stage] *= 0.7

    def moment(self, from_step: int = 0) -> float:
        """A random moment of a run that begins at a step, in seconds from its start, going by the unbroken one."""
        self.whole()
        before, whole = self.before[self.stage], self.seconds[self.stage]
        return self.random.uniform(0.2 * before, before + (whole - before) * (STEPS - from_step) / STEPS)
