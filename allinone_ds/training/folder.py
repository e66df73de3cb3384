"""The folder of a run: names of what lies in it, its checkpoints, clearing it. Quick to import."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from allinone_ds.strict import ConfigError
from allinone_ds.training.manifest import faults_of

CONFIG_FILE = "config.yaml"
MODEL_FILE = "model.json"
METRICS_FILE = "metrics.json"
EVENTS_FILE = "log.jsonl"
LOG_FILE = "train.log"
WEIGHTS_FILE = "model.safetensors"
PAGE_FILE = "predictions.html"
REPORT_FILE = "report.html"
PICTURES = "predictions"
PLOTS = "plots"
AVERAGED = "ema"
EXPORT = "export"
TENSORBOARD = "tensorboard"
WANDB_FILE = "wandb.json"
SUBMISSION = "submission_{}.json"
TRAINER_STATE = "trainer_state.json"
LOCK_FILE = ".lock"
PATIENCE = 120.0
"""Seconds that a run waits for one on another host that still holds its folder."""
UNFINISHED = ".unfinished-"
"""Start of the name that a checkpoint has until all of it is on the disk."""
BROKEN = "broken-"
"""Start of the name that a checkpoint gets when its files are not what was written."""
OWN_FILES = (CONFIG_FILE, MODEL_FILE, METRICS_FILE, EVENTS_FILE, LOG_FILE, WEIGHTS_FILE, PAGE_FILE, PICTURES, PLOTS,
             REPORT_FILE, AVERAGED, EXPORT, TENSORBOARD, WANDB_FILE, LOCK_FILE, SUBMISSION.format("A"),
             SUBMISSION.format("B"))  # fmt: skip


_claimed: dict[Path, IO[str]] = {}  # closing a file would give up this process' lock on it


def claim(folder: str | Path) -> None:
    """Make this process the only one that writes to a run's folder, until it ends, however it ends.

    RUN/.lock is locked by the system: children do not inherit it, a killed process leaves none, NFS knows it between
    hosts. Where a file system has no locks, nothing is refused. A process of another host is waited for, `PATIENCE`
    seconds at most: a scheduler may start a run anew before the old one is gone, and a file server keeps the locks of
    a host that died for a while. A second claim by the same process is no error.

    Raises:
        ConfigError: another process has claimed it, or nothing can be written there.
    """
    folder = Path(folder)
    if folder.resolve() in _claimed:
        return
    until = time.monotonic() + PATIENCE
    file, holder = _try_lock(folder)
    if holder:
        print(f"waiting for {holder}, which writes to {folder}", flush=True)
    while holder:
        file.close()
        if holder.endswith(f" {socket.gethostname()}") or time.monotonic() > until:
            raise _in_use(folder, holder)
        time.sleep(1)
        file, holder = _try_lock(folder)
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only nobody knows whose it is
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _claimed[folder.resolve()] = file


def check_free(folder: str | Path) -> None:
    """Refuse a folder that another process has claimed, and claim nothing.

    Raises:
        ConfigError: it has, or nothing can be written there.
    """
    file, holder = _try_lock(Path(folder))
    file.close()
    if holder:
        raise _in_use(folder, holder)


def _try_lock(folder: Path) -> tuple[IO[str], str]:
    """The lock's file, and whose it is when it is not this process' now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be written to ({error.strerror}); give another output_dir"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            return file, file.read() or "another process"
    return file, ""


def _in_use(folder: str | Path, holder: str) -> ConfigError:
    return ConfigError(
        f"output_dir: {holder} is writing to {folder}, and two runs would spoil each other's files; wait for its end, "
        "end it, or give another output_dir"
    )


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted((p for p in found if p.is_dir()), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def check_resume(asked: Any, folder: Path) -> None:
    """Refuse early what `checkpoint_to_resume` would refuse, as far as names tell; reads no checkpoint.

    Args:
        asked: `trainer.resume_from_checkpoint`: true is the last good one of the folder, or a checkpoint's own folder.
        folder: the run's.

    Raises:
        ConfigError: there is none to resume from, or the folder holds checkpoints that nobody asked to resume.
    """
    last = checkpoints(folder)[-1:]
    if str(asked).lower() == "true":
        if not last:
            raise ConfigError(f"trainer.resume_from_checkpoint: there is no checkpoint in {folder}; leave it out")
    elif asked and str(asked).lower() != "false":
        if not Path(asked).is_dir():
            raise ConfigError(f"trainer.resume_from_checkpoint = {asked}: there is no such folder")
    elif last:
        raise ConfigError(
            f"{folder} already holds {last[0].name}: go on with trainer.resume_from_checkpoint=true, give another "
            "output_dir, or delete the folder"
        )


def checkpoint_to_resume(
    asked: Any, folder: Path, find_faults: Callable[[Path], list[str]] = faults_of
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint that a run starts from: the last one whose files are all as they were written.

    Args:
        asked: `trainer.resume_from_checkpoint`: true is the last good one of the folder, or a checkpoint's own folder.
        folder: the run's.
        find_faults: what is wrong with a checkpoint, one line a fault.

    Returns:
        The checkpoint (None: from the beginning), and the broken ones that were passed over, each with its faults.

    Raises:
        ConfigError: there is none to resume from, or the folder holds checkpoints that nobody asked to resume.
    """
    check_resume(asked, folder)
    if not asked or str(asked).lower() == "false":
        return None, []
    if str(asked).lower() != "true":
        faults = find_faults(Path(asked))
        if faults:
            raise ConfigError(f"trainer.resume_from_checkpoint = {asked}: is broken: {_few(faults)}; give another one")
        return Path(asked), []
    broken: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        faults = find_faults(path)
        if not faults:
            return path, broken
        broken.append((path, _few(faults)))
    found = "; ".join(f"{path.name}: {faults}" for path, faults in broken)
    raise ConfigError(f"trainer.resume_from_checkpoint: no checkpoint in {folder} is whole ({found}); start anew")


def _few(faults: list[str], most: int = 3) -> str:
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return ", ".join(faults[:most]) + more


def set_aside(checkpoint: Path) -> Path:
    """Give a broken checkpoint another name, so that nothing takes it for one; returns its new place."""
    target = checkpoint.with_name(BROKEN + checkpoint.name)
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def prune(folder: str | Path, keep: int | None, best: str | Path | None) -> None:
    """Delete the oldest checkpoints of a run, but neither the last nor the best one.

    Args:
        folder: of the run.
        keep: how many may stay; None or 0: all.
        best: the best one, as it was known when it was written: only its name counts, since a folder may be moved.
    """
    found = checkpoints(folder)
    spared = {path.name for path in found[-1:]} | ({Path(best).name} if best else set())
    surplus = len(found) - max(keep, len(spared)) if keep else 0
    for path in found:
        if surplus > 0 and path.name not in spared:
            surplus -= 1
            old = path.with_name(f"{UNFINISHED}old-{path.name}")  # half of it shall not look like a checkpoint
            with contextlib.suppress(OSError):  # a folder that stays costs room, nothing else
                path.rename(old)
                shutil.rmtree(old)


def clear_unfinished(folder: str | Path) -> None:
    """Delete checkpoints that a run was still writing when it ended."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


def clear_run(folder: str | Path) -> None:
    """Delete what an earlier run left in a folder, and nothing else.

    Raises:
        ConfigError: a run is writing to it.
    """
    folder = Path(folder)
    check_free(folder)
    clear_unfinished(folder)
    for path in [*(folder / name for name in OWN_FILES), *checkpoints(folder), *folder.glob(f"{BROKEN}checkpoint-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
