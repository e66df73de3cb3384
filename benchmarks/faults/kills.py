"""kill -9 at random moments: a run is killed, resumed from its last checkpoint, killed again, and so on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.run_folder.manifest import faults_of
from benchmarks.common.forked_run import SAVE_STEPS, STEPS, Ranks, last_step
from benchmarks.faults.bench import Bench, Lost, require

CHAIN = 5
"""Maximum number of kills of one run before it is resumed to its end."""


def chain_of_kills(bench: Bench, everyone: bool, in_save: bool, most: int) -> int:
    """Kill one rank or all ranks of a run up to `most` times, at random moments of training or of its saves.

    After every kill the last checkpoint must be complete, no older than before the kill, and bitwise equal to that of
    the unbroken run at the same step. The outcome of the last resume must equal that of the unbroken run. The chain
    also ends when a run finishes before the moment of the next kill.

    Args:
        bench: starts the runs.
        everyone: kill all ranks instead of one.
        in_save: kill during a save instead of at any moment of training.
        most: maximum number of kills.

    Returns:
        The number of kills.
    """
    output = bench.new_output()
    kills = 0
    try:
        while kills < min(most, CHAIN):
            bench.unbroken()
            ranks = bench.start_or_resume(output)
            if not _wait_for_a_moment(bench, ranks, output, in_save):
                require(not any(ranks.wait().values()), "the run could not be resumed", ranks)
                if not in_save:
                    bench.came_too_late()
                break
            before = last_step(output)
            scratch = list(output.glob(".unfinished-checkpoint-*"))
            ranks.send(signal.SIGKILL, *(() if everyone else (bench.random.randrange(2),)))
            kills += 1
            ranks.wait(grace=0.0 if in_save else 0.3)
            bench.in_save += any(path.exists() for path in scratch)
            after = last_step(output)
            require(after >= before, f"the checkpoint of step {before} has disappeared", ranks)
            if after:
                faults = faults_of(checkpoints(output)[-1])
                require(not faults, f"the checkpoint of step {after} is broken: {faults}", ranks)
                bench.compare(output, after)
        bench.resume_to_end(output)
    except Lost as error:
        error.tries = max(1, kills)
        raise
    return kills


def _wait_for_a_moment(bench: Bench, ranks: Ranks, output: Path, in_save: bool) -> bool:
    """Wait until the moment of the kill; return False if a rank ended before."""
    if in_save:
        first = last_step(output) + SAVE_STEPS
        step = bench.random.randrange(first, STEPS + 1, SAVE_STEPS) if first <= STEPS else first
        scratch = output / f".unfinished-checkpoint-{step}"
        while len(ranks.alive()) == 2 and not scratch.exists():
            time.sleep(0.0005)
        time.sleep(bench.random.uniform(0, bench.saving[bench.stage]))
    else:
        end = time.monotonic() + bench.moment(last_step(output))
        while len(ranks.alive()) == 2 and time.monotonic() < end:
            time.sleep(0.002)
    return len(ranks.alive()) == 2
