"""Start the DeepSpeed launcher for a run, keep its words in a file, and follow it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from allinone_ds.errors import REQUEUE, RunFailed
from allinone_ds.run_folder.lock import check_free
from allinone_ds.run_folder.names import EVENTS_FILE, LOG_FILE

# Words of libraries that say nothing about the run. Their errors still come through.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_LOG_LEVEL": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


def gpu_count() -> int:
    """GPUs of this machine; torch is only imported where a driver is."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count()


def default_ranks() -> int:
    """One rank a GPU, or two on the CPU."""
    return gpu_count() or 2


def quiet_environment() -> dict[str, str]:
    """Variables that keep libraries from saying what is no news."""
    return dict(QUIET) if gpu_count() else {**QUIET, "DS_ACCELERATOR": "cpu"}


def launch_command(config: str, overrides: Sequence[str], ranks: int) -> list[str]:
    """The launcher's command line for a run on this machine.

    Args:
        config: the run's YAML file.
        overrides: dotted overrides, and flags of allinone_ds.train.
        ranks: processes to start.
    """
    # What `deepspeed --num_accelerators N --module ...` runs on this machine, without its own 5 seconds of imports.
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--log_level=error"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module"]
    return [*launcher, "allinone_ds.train", config, *overrides]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_environment(ranks: int, compiles: bool) -> dict[str, str]:
    """Environment of the ranks: quiet libraries, and the cores shared out among them; what is set already stays.

    Args:
        ranks: processes on this machine.
        compiles: whether the run uses torch.compile.
    """
    own = {**quiet_environment(), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    if not compiles:
        own["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed decorates functions with torch.compile: 3 seconds of imports
    environment = {**own, **os.environ}
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def follow_run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, on_event: Callable[[dict[str, Any]], None]
) -> None:
    """Run the launcher to its end, its output in RUN/train.log, and hand on what RUN/log.jsonl says.

    SIGTERM and SIGUSR1 are handed on to the ranks, which save and exit (the launcher itself would end with another
    status). An interrupt ends the launcher, and thereby the ranks in the same way.

    Args:
        command: from `launch_command`.
        environment: from `launch_environment`.
        folder: of the run.
        on_event: called with every event: {"event": "begin" | "log" | "end", "step": ..., ...}.

    Raises:
        ConfigError: a run is writing to the folder, or nothing can be written there.
        RunFailed: the launcher ended with an error, or with the status `REQUEUE` after a signal.
    """
    check_free(folder)
    log = folder / LOG_FILE
    events = _tail(folder / EVENTS_FILE)
    received: list[int] = []
    with log.open("ab") as sink, _caught(received):
        start = sink.tell()
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,  # an interrupt reaches the ranks through the launcher, once
        )
        try:
            while process.poll() is None:
                for event in next(events):
                    on_event(event)
                while received:
                    _hand_on(process.pid, received.pop())
                time.sleep(0.2)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=40)  # the launcher itself waits 30 s for its ranks
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    for event in next(events):
        on_event(event)
    if process.returncode == REQUEUE:
        raise RunFailed("the run was asked to stop; its last step is saved, go on with --resume", REQUEUE)
    if process.returncode:
        raise RunFailed(_what_went_wrong(log, start), process.returncode)


@contextlib.contextmanager
def _caught(received: list[int]) -> Iterator[None]:
    """Within it, SIGTERM and SIGUSR1 of this process are only noted in `received`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda got, frame: received.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hand_on(launcher: int, number: int) -> None:
    """Send a signal to the ranks, which are the launcher's children."""
    with contextlib.suppress(psutil.Error):
        for rank in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)


def _tail(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields, whenever asked, the events that were added to the file since."""
    position = path.stat().st_size if path.is_file() else 0
    while True:
        found: list[dict[str, Any]] = []
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    position += len(line)
                    with contextlib.suppress(ValueError):  # the last line of a run that was killed
                        found.append(json.loads(line))
        yield found


def _what_went_wrong(log: Path, start: int, lines: int = 40) -> str:
    """The run's own error message, else the last lines of its log."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace").splitlines()
    for number, line in enumerate(text):
        if line.startswith("error: "):
            own = [line.removeprefix("error: ")]
            for more in text[number + 1 :]:
                if more.startswith("["):
                    break
                own.append(more)
            return "\n".join(own).rstrip()
    return "\n".join([f"the run failed; the end of {log}:", *text[-lines:]])
