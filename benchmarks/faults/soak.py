"""kill -9 at random moments: a run is killed, the run that goes on from it is killed too, and so on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from bench import Bench, Lost, demand
from ranks import SAVE_STEPS, STEPS, Ranks, last_step

from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.run_folder.manifest import faults_of

CHAIN = 5
"""Kills of one run at most, before it may go on to its end."""


def soak(bench: Bench, everyone: bool, in_save: bool, most: int) -> int:
    """Kill one rank or all of a run up to `most` times, at random moments of it or of its saves.

    After every kill the last checkpoint must be whole, no older than before, and equal to the unbroken run's of the
    same step, bit for bit; at the end the run must end as that one did. A run that ends before a kill comes ends the
    chain.

    Returns:
        How many kills there were.
    """
    output = bench.output()
    kills = 0
    try:
        while kills < min(most, CHAIN):
            bench.whole()
            ranks = bench.resumed(output)
            if not _wait_for_a_moment(bench, ranks, output, in_save):
                demand(not any(ranks.wait().values()), "the run could not go on", ranks)
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
            demand(after >= before, f"the checkpoint of step {before} is gone", ranks)
            if after:
                faults = faults_of(checkpoints(output)[-1])
                demand(not faults, f"the checkpoint of step {after} is broken: {faults}", ranks)
                bench.compare(output, after)
        bench.go_on(output)
    except Lost as error:
        error.tries = max(1, kills)
        raise
    return kills


def _wait_for_a_moment(bench: Bench, ranks: Ranks, output: Path, in_save: bool) -> bool:
    """Wait until the kill is due; False when a rank has ended before that."""
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
