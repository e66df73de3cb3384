"""The rows of the table: each fault, how it is injected, and how often it is tried."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.forked_run import LOGGING_STEPS, STEPS
from benchmarks.faults.kills import chain_of_kills
from benchmarks.faults.tries import NAN, Tries

INF = float("inf")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        fault: name of the fault.
        how: how it is injected.
        times: number of tries to make; 0 where the fault cannot be injected.
        stages: ZeRO stages of successive attempts.
        attempt: called with the bench and the number of tries left; returns how many it made (None: one).
        attempts: number of calls of `attempt`.
        tried: number of tries.
        kept: number of tries in which nothing was lost.
        in_save: number of kills that left an unfinished checkpoint.
        seconds: duration of all attempts.
        notes: what was lost, or why the fault was not tried.
    """

    fault: str
    how: str
    times: int
    stages: tuple[int, ...]
    attempt: Callable[[Tries, int], int | None]
    attempts: int = 0
    tried: int = 0
    kept: int = 0
    in_save: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return all fields except `attempt`, as JSON values."""
        content = {key: value for key, value in vars(self).items() if key != "attempt"}
        return {**content, "seconds": round(self.seconds, 1)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from the record of an earlier, interrupted start of the same command."""
        for key in ("times", "attempts", "tried", "kept", "in_save", "seconds", "notes"):
            setattr(self, key, saved[key])


def rows(kills: int, times: int, stages: tuple[int, ...], once: bool) -> list[Row]:
    """Return all rows of the table before the first try.

    Args:
        kills: number of kill -9 in total.
        times: tries of each other row with a random moment or file.
        stages: ZeRO stages; rows without randomness are tried once per stage.
        once: make 10 kills and try each other row once with ZeRO-2; only the first row uses all stages.
    """
    each = len(stages)
    if once:
        kills, times, each = 10, 1, 1
    counts = {"kills": iter(kills // 4 + (k < kills % 4) for k in range(4)), "times": times, "stages": each, "once": 1}
    table = []
    for fault, how, kind, attempt in _rows(once):
        count = counts[kind]
        wanted = next(count) if kind == "kills" else count
        of_row = (2,) if kind == "once" or once else stages
        table.append(Row(fault, how, wanted, of_row, attempt))
    cut = table[0]
    cut.stages, cut.times = stages, len(stages) * len(cut_steps(once))
    return table


def change_head(tasks: dict[str, Any]) -> None:
    """Change the width of a head in a run's `tasks:` block."""
    tasks["seg"]["options"]["width"] = 16


def cut_steps(once: bool) -> Sequence[int]:
    """Return the steps after which a run is stopped and resumed."""
    return [LOGGING_STEPS + 2] if once else range(1, STEPS)


def _rows(once: bool) -> Iterator[tuple[str, str, str, Callable[[Tries, int], int | None]]]:
    how = "stopped between two logs" if once else "stopped after each of its steps, resumed from each"
    yield "run cut in pieces", how, "stages", lambda b, _: b.cut(cut_steps(once))
    how = "cosines measured, a task left out before it"
    yield "run cut between two logs", how, "stages", lambda b, _: b.cut_between_logs()
    yield "run cut, fp16 loss scale falling", "stopped after half of its steps", "once", lambda b, _: b.cut_fp16()
    how = "2 ranks ZeRO-2, then 4 ranks ZeRO-2, then 1 rank ZeRO-3"
    yield "other ranks and ZeRO stage", how, "once", lambda b, _: b.reshard()
    yield "old checkpoints", "save_total_limit 2", "once", lambda b, _: b.keep_two()
    how = "SIGTERM one step after it, save_total_limit 1, the run's folder moved"
    yield "best checkpoint, save_strategy steps", how, "once", lambda b, _: b.best("steps")
    yield "best checkpoint, save_strategy best", how, "once", lambda b, _: b.best("best")
    yield "two runs in one folder", "a second start beside a running one", "once", lambda b, _: b.twice()
    how, dropped = "resumed without it", "task 'cls' of the checkpoint is dropped"
    yield "task taken out", how, "once", lambda b, _: b.other_model(lambda tasks: tasks.pop("cls"), dropped, 0)
    how, refused = "resumed with a head of 16 instead of 32 channels", "task 'seg' has a different head than 'seg'"
    yield "other head", how, "once", lambda b, _: b.other_model(change_head, refused, 2)
    how = "SIGKILL at a random moment, again after every resume"
    yield "kill -9 of one rank", how, "kills", lambda b, left: chain_of_kills(b, False, False, left)
    yield "kill -9 of all ranks", how, "kills", lambda b, left: chain_of_kills(b, True, False, left)
    how = "SIGKILL at a random moment of a save, again after every resume"
    yield "kill -9 of one rank in a save", how, "kills", lambda b, left: chain_of_kills(b, False, True, left)
    yield "kill -9 of all ranks in a save", how, "kills", lambda b, left: chain_of_kills(b, True, True, left)
    how = "at a random moment of training"
    yield "SIGTERM to all ranks", how, "times", lambda b, _: b.stop(signal.SIGTERM, True)
    yield "SIGTERM to one rank", how, "times", lambda b, _: b.stop(signal.SIGTERM, False)
    yield "SIGUSR1 to all ranks", how, "times", lambda b, _: b.stop(signal.SIGUSR1, True)
    yield "SIGUSR1 to one rank", how, "times", lambda b, _: b.stop(signal.SIGUSR1, False)
    yield "SIGTERM to ranks and data workers", "in mid-run", "stages", lambda b, _: b.stop_with_workers()
    yield "truncated checkpoint", "a random file of the last one cut", "times", lambda b, _: b.damage(False)
    how = "a random bit of a random file of the last one"
    yield "bit flip in a checkpoint", how, "times", lambda b, _: b.damage(True)
    yield "disk full while saving", "run folder on a 4 MiB disk in memory", "stages", lambda b, _: b.disk_full()
    yield "rank 0 stops answering", "SIGSTOP, stall_timeout 2 s", "stages", lambda b, _: b.standstill(0)
    yield "rank 1 stops answering", "SIGSTOP, stall_timeout 2 s", "stages", lambda b, _: b.standstill(1)
    how = "SIGSTOP to all, SIGCONT after 5 s, stall_timeout 2 s"
    yield "job suspended", how, "stages", lambda b, _: b.suspended()
    how = "one task, rank 1, one step"
    yield "NaN loss, skip_task", how, "stages", lambda b, _: b.nonfinite("skip_task", NAN)
    yield "NaN loss, skip_step", how, "stages", lambda b, _: b.nonfinite("skip_step", NAN)
    yield "NaN loss, stop", how, "stages", lambda b, _: b.nonfinite("stop", NAN)
    how = "one task, rank 1, two steps"
    yield "inf loss, skip_task", how, "stages", lambda b, _: b.nonfinite("skip_task", INF, 4)
    yield "inf loss, skip_step", how, "stages", lambda b, _: b.nonfinite("skip_step", INF, 4)
    yield "inf loss, stop", how, "stages", lambda b, _: b.nonfinite("stop", INF, 4)
    how = "one task, rank 1, every step from the fourth on, nonfinite_limit 3"
    yield "NaN loss for ever, skip_task", how, "stages", lambda b, _: b.nonfinite("skip_task", NAN, STEPS)
    yield "NaN loss for ever, skip_step", how, "stages", lambda b, _: b.nonfinite("skip_step", NAN, STEPS)
    how = "1 PiB asked for in a micro-step of rank 1"
    yield "out of memory on a CPU", how, "stages", lambda b, _: b.memory(False)
    how = "torch.OutOfMemoryError raised by hand in a micro-step of rank 1"
    yield "out of memory on a GPU", how, "stages", lambda b, _: b.memory(True)
    yield "data source vanishes", "its folder renamed in mid-run", "stages", lambda b, _: b.data_gone()
    yield "secrets in the environment", "every written file searched for them", "stages", lambda b, _: b.secrets()
    yield "resume reads old data", "samples read after a resume counted", "stages", lambda b, _: b.reads_no_data()


def markdown(table: Sequence[Row]) -> str:
    """Return the table as Markdown, followed by the notes on what was lost or could not be tried."""
    lines = ["| fault | injected | tried | lost nothing |", "|---|---|---|---|"]
    lines += [f"| {row.fault} | {row.how} | {row.tried} | {row.kept} |" for row in table]
    kills = [row for row in table if row.fault.startswith("kill -9")]
    if kills:
        moments, in_save = sum(row.tried for row in kills), sum(row.in_save for row in kills)
        lines += ["", f"kill -9 at {moments} moments in total; {in_save} left an unfinished checkpoint."]
    lines += [f"\n{row.fault}: {note}" for row in table for note in row.notes]
    return "\n".join(lines)
