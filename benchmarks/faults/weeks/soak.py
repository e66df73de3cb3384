"""Train under one fault after another, then without any, and note what each fault did."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allinone_ds.run_folder.names import EVENTS_FILE
from benchmarks.common.forked_run import last_step
from benchmarks.faults.weeks.compare import events_of
from benchmarks.faults.weeks.hosts import TwoHosts
from benchmarks.faults.weeks.run import FOREVER, SAVE_STEPS, make_data, write_run
from benchmarks.faults.weeks.schedule import SURVIVED, Fault, fault

START_LIMIT = 600.0
"""Seconds from a start to the first step."""
END_LIMIT = 420.0
"""Seconds from a fault to the end of the launchers, of which one may wait 300 s for the other; and from the end of a
fault to the next step."""
LAUNCHER_NOTICES = 20.0
"""Seconds after the first step in which a launcher may still end the run because of the fault."""
MOST_LOST = 2 * SAVE_STEPS
"""Steps: a checkpoint in the background may not be complete when the next one is due."""
MESSAGES = {"disk full": "no space left", "data gone": "cannot be read"}
"""Fault -> what the run must print."""


class Stopped(Exception):
    """The run cannot go on."""


class Soak:
    """The run under faults, and the record of what happened.

    Args:
        hosts: on which it runs.
        out: folder of the command, in which an interrupted command continues.
        settings: seed, gap and sample, in the record; of an earlier start of the command they must be equal.

    Attributes:
        record: everything that is known, written to OUT/record.json after each fault.
    """

    def __init__(self, hosts: TwoHosts, out: Path, settings: dict[str, Any]) -> None:
        self.hosts, self.out = hosts, out
        self.data, self.away, self.step_file = out / "data", out / "data-away", out / "step"
        self.output = hosts.disk / "run"
        self.config = out / "run.yaml"
        self.record: dict[str, Any] = {
            "settings": settings, "commands": 0, "seconds": 0.0, "starts": [], "faults": [], "violations": [],
            "pending": None, "steps": None, "undisturbed": None,
        }  # fmt: skip
        file = out / "record.json"
        if file.exists():
            found = json.loads(file.read_text())
            if found["settings"] != settings:
                raise Stopped(f"{out} holds a soak with {found['settings']}, not {settings}; choose a different --out")
            self.record = found
        self.record["commands"] += 1
        self._earlier, self._begun, self._sampled = self.record["seconds"], time.monotonic(), 0.0
        self._step = 0

    # ---- time, samples and the record ----

    def seconds(self) -> float:
        """Return the seconds that all starts of the command took so far."""
        return self._earlier + time.monotonic() - self._begun

    def save(self) -> None:
        """Write the record."""
        self.record["seconds"] = round(self.seconds(), 1)
        part = self.out / "record.part"
        part.write_text(json.dumps(self.record, indent=1) + "\n")
        part.replace(self.out / "record.json")

    def violation(self, text: str) -> None:
        """Note something that the run must not do."""
        self.record["violations"].append(text)
        self.say(f"VIOLATION: {text}")

    def say(self, text: str) -> None:
        """Print a line with the time."""
        minutes, seconds = divmod(int(self.seconds()), 60)
        print(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}  {text}", file=sys.stderr, flush=True)

    def watch(self, seconds: float, until: Callable[[], bool]) -> bool:
        """Take samples until a condition holds; return whether it did within the time."""
        end = time.monotonic() + seconds
        while not (holds := until()) and time.monotonic() < end:
            due = time.monotonic() - self._sampled >= self.record["settings"]["sample"]
            if due and self.step() not in (None, self.record["steps"]):  # not while ranks start or end
                self._sampled = time.monotonic()
                sample = {"time": round(self.seconds(), 1), "start": len(self.record["starts"]), "step": self._step}
                line = {**sample, "of": self.hosts.usage(self.output)}
                with (self.out / "samples.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            time.sleep(0.25)
        return holds

    def step(self) -> int | None:
        """Return the number of steps that the run has made; None before the first one since its start."""
        text = self.step_file.read_text() if self.step_file.exists() else ""
        if not text and not self.step_file.exists():
            return None
        self._step = int(text or self._step)  # empty while rank 0 writes it
        return self._step

    # ---- the run ----

    def prepare(self) -> None:
        """Write data and configuration, and undo what an interrupted command left."""
        if self.away.exists():
            self.away.rename(self.data)
        make_data(self.data)
        self.ballast.unlink(missing_ok=True)
        write_run(self.config, data=self.data, output=self.output, progress=self.step_file, steps=FOREVER)
        if self.record["pending"] is not None:
            self.record["faults"].append({**self.record["pending"], "outcome": "not judged: the command was ended"})
            self.record["pending"] = None
        self.save()

    @property
    def ballast(self) -> Path:
        """The file that takes all space."""
        return self.hosts.disk / "ballast"

    def start(self, *overrides: str) -> int:
        """Start the run on both hosts and wait for its first step; return the step that it resumed from.

        Raises:
            Stopped: it did not start.
        """
        self.step_file.unlink(missing_ok=True)
        saved = last_step(self.output)
        self.hosts.launch(self.config, self.output, *overrides)
        self.watch(START_LIMIT, lambda: self.step() is not None or len(self.hosts.running()) < 2)
        if self.step() is None:
            self.violation(f"no step within {START_LIMIT:.0f} s of a start: {self.message()}")
            self.save()
            raise Stopped(f"the run does not start; see {self.hosts.logs['a']}")
        begun = [event["step"] for event in events_of(self.output / EVENTS_FILE) if event["event"] == "begin"][-1]
        if begun != saved:
            self.violation(f"the run resumed from step {begun}, its last checkpoint was of step {saved}")
        self.record["starts"].append({"time": round(self.seconds(), 1), "step": begun})
        self.save()
        return begun

    def message(self) -> str:
        """Return the first error that the hosts printed since the last start."""
        for text in self.hosts.printed().values():
            if found := re.search(r"error: (?!Signal)[^\n]+", text):
                return found[0][:400]
        for text in self.hosts.printed().values():
            if found := re.search(r"^\S*(Error|Exception|SIGKILL)[^\n]*", text, re.MULTILINE):
                return found[0][:400]
        return "(no error was printed)"

    def train(self, hours: float) -> None:
        """Train under faults until the time is over, then stop the run."""
        if self.record["steps"] is not None:
            return
        self.start()
        while self.seconds() < hours * 3600:
            number = len(self.record["faults"])
            settings = self.record["settings"]
            one = fault(settings["seed"], number, settings["gap"])
            left = hours * 3600 - self.seconds()
            if self.watch(min(one.gap, left), lambda: len(self.hosts.running()) < 2):
                self.violation(f"the run ended without a fault: {self.message()}")
                self.end_both(0.0)
                self.start()
                continue
            if one.gap >= left:
                break
            self.record["pending"] = {**asdict(one), "at": round(self.seconds(), 1)}
            self.save()
            outcome = self.survive(one) if one.kind in SURVIVED else self.end_and_resume(one)
            self.record["faults"].append({**self.record["pending"], **outcome})
            self.record["pending"] = None
            self.save()
            words = "; ".join(f"{key} {value}" for key, value in outcome.items())
            self.say(f"fault {number}, {one.kind}: {words}")
        self.stop()

    def stop(self) -> None:
        """Stop the run under faults with SIGTERM."""
        for launcher in self.hosts.launchers.values():
            launcher.send_signal(signal.SIGTERM)
        self.watch(END_LIMIT, lambda: not self.hosts.running())
        self.end_both(15.0)
        reached = self.step() or 0
        if last_step(self.output) != reached:
            self.violation(f"stopped after step {reached}, its last checkpoint is of step {last_step(self.output)}")
        self.record["steps"], self.record["hours"] = last_step(self.output), round(self.seconds() / 3600, 2)
        self.save()

    def undisturbed(self) -> None:
        """Train the same number of steps without faults."""
        if self.record["undisturbed"] is not None:
            return
        steps, self.output, self.config = self.record["steps"], self.hosts.disk / "undisturbed", self.out / "plain.yaml"
        write_run(self.config, data=self.data, output=self.output, progress=self.step_file, steps=steps)
        self.say(f"the same run without faults: {steps} steps")
        begun = self.start()
        self.watch(10 * 24 * 3600, lambda: not self.hosts.running())
        codes = {host: launcher.returncode for host, launcher in self.hosts.launchers.items()}
        if any(codes.values()):
            self.violation(f"the run without faults ended with {codes}: {self.message()}")
        self.record["undisturbed"] = {"resumed_from": begun}
        self.save()

    # ---- faults ----

    def survive(self, one: Fault) -> dict[str, Any]:
        """Inject a fault after which the run must go on by itself."""
        undo = self.begin(one)
        self.watch(one.seconds, lambda: len(self.hosts.running()) < 2)
        undo()
        released, reached = time.monotonic(), self.step() or 0
        went_on = self.watch(END_LIMIT, lambda: (self.step() or 0) > reached or len(self.hosts.running()) < 2)
        recovered = round(time.monotonic() - released, 1)
        self.watch(LAUNCHER_NOTICES, lambda: len(self.hosts.running()) < 2)
        if went_on and len(self.hosts.running()) == 2:
            return {"outcome": "went on", "recovered_s": recovered, "steps_lost": 0}
        said = self.message() if went_on else f"no step within {END_LIMIT:.0f} s"
        self.violation(f"fault {one.number}, {one.kind} for {one.seconds} s: the run did not go on: {said}")
        self.end_both(END_LIMIT)
        return {"outcome": f"ended: {said}", "steps_lost": (self.step() or 0) - self.start()}

    def end_and_resume(self, one: Fault) -> dict[str, Any]:
        """Inject a fault that ends the run, and start it again."""
        name, begun = f"fault {one.number}, {one.kind}", time.monotonic()
        undo = self.begin(one)
        if not self.watch(END_LIMIT, lambda: not self.hosts.running()):
            self.violation(f"{name}: host {self.hosts.running()} still runs after {END_LIMIT:.0f} s: {self.message()}")
        ended = time.monotonic() - begun
        codes = [launcher.poll() for launcher in self.hosts.launchers.values()]
        reached, said = self.step() or 0, self.message()
        self.end_both(15.0)
        undo()
        if 0 in codes:
            self.violation(f"{name}: a launcher ended with exit status 0 instead of an error")
        if one.kind in MESSAGES and MESSAGES[one.kind] not in said.lower():
            self.violation(f"{name}: '{MESSAGES[one.kind]}' was not printed, but: {said}")
        events = events_of(self.output / EVENTS_FILE)
        stopped = one.kind.endswith("preempted")
        if stopped and events[-1]["event"] != "stopped":
            self.violation(f"{name}: the last event is {events[-1]}, not 'stopped'")
        resumed = self.start()
        if reached - resumed > (0 if stopped else MOST_LOST):
            self.violation(f"{name}: {reached - resumed} steps were lost")
        recovered = time.monotonic() - begun
        outcome = f"stopped with {codes}: {said}" if not stopped else f"saved and stopped with {codes}"
        return {
            "outcome": outcome, "ended_s": round(ended, 1), "recovered_s": round(recovered, 1),
            "resumed_from": resumed, "steps_lost": reached - resumed,
        }  # fmt: skip

    def end_both(self, patience: float) -> None:
        """Kill what is left of the run on both hosts, and note processes that outlived the launchers."""
        self.watch(patience, lambda: not self.hosts.processes())
        if left := [process.name() for process in self.hosts.processes() if process.is_running()]:
            self.violation(f"processes were left on the hosts: {left}")
        for host in self.hosts.launchers:
            self.hosts.kill_all(host)

    def begin(self, one: Fault) -> Callable[[], object]:
        """Begin a fault; return the function that ends it."""
        hosts, ranks, host = self.hosts, self.hosts.ranks(), "ab"[one.rank % 2]
        match one.kind:
            case "rank suspended":
                hosts.signal(signal.SIGSTOP, ranks[one.rank])
                return lambda: hosts.signal(signal.SIGCONT, ranks[one.rank])
            case "job suspended":
                everything = hosts.processes()
                hosts.signal(signal.SIGSTOP, *everything)
                return lambda: hosts.signal(signal.SIGCONT, *everything)
            case "slow disk":
                hosts.freeze(True)
                return lambda: hosts.freeze(False)
            case "network cut":
                hosts.connect(False)
                return lambda: hosts.connect(True)
            case "rank killed":
                hosts.signal(signal.SIGKILL, ranks[one.rank])
            case "all ranks killed":
                hosts.signal(signal.SIGKILL, *ranks.values())
            case "host preempted":
                hosts.launchers[host].send_signal(signal.SIGTERM)
            case "job preempted":
                for launcher in hosts.launchers.values():
                    launcher.send_signal(signal.SIGTERM)
            case "disk full":
                self.fill_disk()
                return lambda: self.ballast.unlink()
            case "data gone":
                self.data.rename(self.away)
                return lambda: self.away.rename(self.data)
            case "host lost":
                hosts.lose(host)
                return lambda: hosts.connect(True)
        return lambda: None

    def fill_disk(self) -> None:
        """Take all space of the file system of the run's folder."""
        with self.ballast.open("wb", buffering=0) as file:
            for size in (2**20, 2**12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:  # no space left
                    continue
