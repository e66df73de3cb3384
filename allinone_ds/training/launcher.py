"""Start the DeepSpeed launcher for a run on this machine, and follow its log until it ends."""

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

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_LOG_LEVEL": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}
"""Variables that silence messages of libraries about anything but errors."""


def gpu_count() -> int:
    """Return the number of GPUs of this machine. Imports torch only if there is a GPU driver."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count()


def default_ranks() -> int:
    """Return one rank per GPU; 2 on a machine without GPUs."""
    return gpu_count() or 2


def quiet_environment() -> dict[str, str]:
    """Return environment variables that silence libraries, and that select the CPU if there is no GPU."""
    return dict(QUIET) if gpu_count() else {**QUIET, "DS_ACCELERATOR": "cpu"}


def launch_command(config: str, overrides: Sequence[str], ranks: int) -> list[str]:
    """Return the launcher's command line for a run on this machine.

    Args:
        config: YAML file of the run.
        overrides: dotted overrides, and options of `allinone_ds.train`.
        ranks: number of processes.
    """
    # the command that `deepspeed --num_accelerators N --module ...` starts, without its 5 seconds of imports
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--log_level=error"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module"]
    return [*launcher, "allinone_ds.train", config, *overrides]


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_environment(ranks: int, compiles: bool) -> dict[str, str]:
    """Return the environment of the ranks: silent libraries, and an equal number of cores per rank.

    Variables that are already set keep their values.

    Args:
        ranks: number of processes on this machine.
        compiles: whether the run uses torch.compile.
    """
    own = {**quiet_environment(), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    if not compiles:
        own["TORCHDYNAMO_DISABLE"] = "1"  # else DeepSpeed's uses of torch.compile import for 3 s
    environment = {**own, **os.environ}
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def follow_run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, on_event: Callable[[dict[str, Any]], None]
) -> None:
    """Run the launcher until it ends, append its output to RUN/train.log, and report the events in RUN/log.jsonl.

    SIGTERM and SIGUSR1 are forwarded to the ranks, which save a checkpoint and exit; the launcher itself would exit
    with a different code. An interrupt ends the launcher, which then sends SIGTERM to the ranks.

    Args:
        command: from `launch_command`.
        environment: from `launch_environment`.
        folder: folder of the run.
        on_event: called with each event of the log, see `EventLog`.

    Raises:
        ConfigError: a run is writing to the folder, or the folder cannot be written to.
        RunFailed: the launcher failed, or ended with exit code `REQUEUE` after a signal.
    """
    check_free(folder)
    log = folder / LOG_FILE
    events = _tail(folder / EVENTS_FILE)
    received: list[int] = []
    with log.open("ab") as sink, _collected_signals(received):
        start = sink.tell()
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,  # so that an interrupt reaches the ranks once, through the launcher
        )
        try:
            while process.poll() is None:
                for event in next(events):
                    on_event(event)
                while received:
                    _forward_signal(process.pid, received.pop())
                time.sleep(0.2)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=40)  # the launcher waits 30 s for its ranks
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    for event in next(events):
        on_event(event)
    if process.returncode == REQUEUE:
        raise RunFailed("the run ended because of a signal; its last step is saved, resume with --resume", REQUEUE)
    if process.returncode:
        raise RunFailed(_error_message(log, start), process.returncode)


@contextlib.contextmanager
def _collected_signals(received: list[int]) -> Iterator[None]:
    """Append SIGTERM and SIGUSR1 to `received` instead of handling them."""
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


def _forward_signal(launcher: int, number: int) -> None:
    """Send a signal to the ranks, which are the child processes of the launcher."""
    with contextlib.suppress(psutil.Error):
        for rank in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)


def _tail(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the events that were appended to the file since the previous `next`."""
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


def _error_message(log: Path, start: int, lines: int = 40) -> str:
    """Return the error message of the run, or the last lines of its log if there is none."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace").splitlines()
    for number, line in enumerate(text):
        if line.startswith("error: "):
            message = [line.removeprefix("error: ")]
            for more in text[number + 1 :]:
                if more.startswith("["):
                    break
                message.append(more)
            return "\n".join(message).rstrip()
    return "\n".join([f"the run failed; the last lines of {log}:", *text[-lines:]])
