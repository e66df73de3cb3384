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
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from allinone_ds.errors import INTERRUPTED, REQUEUE, ConfigError, RunFailed
from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.run_folder.lock import check_free
from allinone_ds.run_folder.names import EVENTS_FILE, LOG_FILE
from allinone_ds.run_folder.new_folder import missing_folders, remove_failed_start
from allinone_ds.training.ranks.command_watch import COMMAND
from allinone_ds.training.ranks.failures import FAILURES, first_failure

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
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
    world = base64.urlsafe_b64encode(json.dumps({"localhost": accelerators(ranks)}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--log_level=error"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module"]
    return [*launcher, "allinone_ds.train", config, *overrides]


def accelerators(ranks: int) -> list[int | str]:
    """Return the accelerator of each rank: those of CUDA_VISIBLE_DEVICES, which the launcher of DeepSpeed sets anew.

    Args:
        ranks: number of processes on this machine.

    Raises:
        ConfigError: the variable names fewer GPUs.
    """
    named = [name for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if (name := entry.strip())]
    if not named or not gpu_count():
        return list(range(ranks))
    if len(named) < ranks:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={','.join(named)} names {len(named)} GPU(s) for {ranks} ranks; name one per rank, "
            f"or start {len(named)} rank(s) with --nproc {len(named)}"
        )
    return list(named[:ranks])


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
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    on_event: Callable[[dict[str, Any]], None],
    resume: str = "",
) -> None:
    """Run the launcher until it ends, append its output to RUN/train.log, and report the events in RUN/log.jsonl.

    SIGTERM, SIGUSR1 and an interrupt reach the ranks as signals on which they save a checkpoint and exit; the launcher
    itself would exit with a different code. A second interrupt ends the launcher, which ends the ranks. If the process
    of this function is killed, the ranks save and exit as well (`end_with_command`).

    The folder is removed again if this call created it and training did not begin, unless its log is the only hint at
    the reason.

    Args:
        command: from `launch_command`.
        environment: from `launch_environment`.
        folder: folder of the run.
        on_event: called with each event of the log, see `EventLog`.
        resume: command that resumes the run, for messages.

    Raises:
        ConfigError: a run is writing to the folder, or the folder cannot be written to.
        RunFailed: the launcher failed, or a signal ended the run. Its message ends with the error of the rank that
            failed first, or says what was saved.
    """
    made = missing_folders(folder)
    log = folder / LOG_FILE
    check_free(folder)
    events = _tail(folder / EVENTS_FILE)
    received: list[int] = []
    signals: list[int] = []
    stopped: list[int] = []

    def report_events() -> None:
        for event in next(events):
            if event["event"] == "stopped":
                stopped.append(event["step"])
            on_event(event)

    with TemporaryDirectory(prefix="allinone_ds-") as failures, log.open("ab") as sink, _collected_signals(received):
        start = sink.tell()
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, FAILURES: failures, COMMAND: str(os.getpid())},
            start_new_session=True,  # so that an interrupt reaches the ranks once, through this function
        )
        try:
            while process.poll() is None:
                report_events()
                while received:
                    signals.append(received.pop(0))
                    _pass_on(process, signals)
                time.sleep(0.2)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=40)  # the launcher waits 30 s for its ranks
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        failure = first_failure(failures)
        if failure is not None and process.returncode not in (0, REQUEUE):
            sink.write(f"\n[allinone_ds] rank {failure.rank} failed first:\n{failure.message}\n".encode())
    report_events()
    if not process.returncode:
        return
    if process.returncode == REQUEUE or (signals and (failure is None or failure.lost)):
        interrupted = signal.SIGINT in signals
        name = (
            "interrupted" if interrupted else f"ended by {signal.Signals(signals[0]).name if signals else 'a signal'}"
        )
        saved = _saved(folder, stopped, resume)
        remove_failed_start(made)
        raise RunFailed(f"{name}: {saved}", INTERRUPTED if interrupted else process.returncode)
    if failure is None:
        raise RunFailed(_error_message(log, start, process.returncode), process.returncode)
    gone = remove_failed_start(made)
    if failure.exit_code is not None:
        raise RunFailed(failure.message, failure.exit_code)
    where = "" if gone else f" (all output is in {log})"
    raise RunFailed(f"rank {failure.rank} failed first{where}:\n{failure.message}", process.returncode)


def _saved(folder: Path, stopped: Sequence[int], resume: str) -> str:
    """Return what a run that was stopped has saved, and how to continue it."""
    again = f"resume with `{resume}`" if resume else "resume with --resume"
    if stopped:
        return f"step {stopped[-1]} is saved in {folder / f'checkpoint-{stopped[-1]}'}; {again}"
    if found := checkpoints(folder):
        return f"the run could not save its last step, its last checkpoint is {found[-1]}; {again}"
    return "no step was saved"


@contextlib.contextmanager
def _collected_signals(received: list[int]) -> Iterator[None]:
    """Append SIGINT, SIGTERM and SIGUSR1 to `received` instead of handling them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda got, frame: received.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(launcher: subprocess.Popen[bytes], signals: Sequence[int]) -> None:
    """Send the last of the received signals to the ranks, which are the child processes of the launcher.

    An interrupt becomes SIGTERM; after a second one, and where there are no ranks yet, the launcher itself ends.
    """
    number = signal.SIGTERM if signals[-1] == signal.SIGINT else signals[-1]
    ranks: list[psutil.Process] = []
    if list(signals).count(signal.SIGINT) < 2:
        with contextlib.suppress(psutil.Error):
            ranks = psutil.Process(launcher.pid).children()
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            rank.send_signal(number)
    if not ranks:
        launcher.send_signal(signal.SIGTERM)


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


def _error_message(log: Path, start: int, status: int, lines: int = 40) -> str:
    """Return the error message of a run without a recorded failure, or the last lines of its log if there is none."""
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
    killed = [f"{number.name} ended a rank" for number in signal.Signals if status in (-number, 256 - number)]
    what = killed[0] if killed else "the run failed"
    return "\n".join([f"{what}; the last lines of {log}:", *text[-lines:]])
