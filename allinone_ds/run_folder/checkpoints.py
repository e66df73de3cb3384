"""The checkpoints in the folder of a run: list them, choose one to resume, delete old ones. Imports no torch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.lock import check_free
from allinone_ds.run_folder.manifest import faults_of
from allinone_ds.run_folder.names import BROKEN, FROZEN_FILE, OWN_FILES, UNFINISHED
from allinone_ds.strict import expand_path


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted((p for p in found if p.is_dir()), key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """Return the optimizer step in the name of a checkpoint folder.

    Example:
        >>> step_of("runs/demo/checkpoint-250")
        250
    """
    return int(Path(checkpoint).name.rpartition("-")[2])


def parse_resume(value: Any) -> bool | Path:
    """Return the meaning of a `resume_from_checkpoint` value.

    Args:
        value: true, false, "true", "false", None or the folder of a checkpoint.

    Returns:
        True: resume from the last complete checkpoint of the run; False: start from the beginning; else the folder of
        the checkpoint.

    Example:
        >>> parse_resume("true"), parse_resume(None), parse_resume("runs/demo/checkpoint-250").name
        (True, False, 'checkpoint-250')
    """
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return Path(expand_path(value)) if isinstance(value, str | Path) and value else bool(value)


def check_resume(resume_from: bool | str | Path | None, folder: Path) -> None:
    """Refuse what `checkpoint_to_resume` would refuse, as far as the names of the folders show. Reads no checkpoint.

    Args:
        resume_from: from `parse_resume`.
        folder: folder of the run.

    Raises:
        ConfigError: there is no checkpoint to resume, or the folder holds checkpoints and `resume_from` is False.
    """
    last = checkpoints(folder)[-1:]
    if resume_from is True:
        if not last:
            raise ConfigError(f"trainer.resume_from_checkpoint: there is no checkpoint in {folder}; remove the option")
    elif resume_from:
        if not Path(resume_from).is_dir():
            raise ConfigError(f"trainer.resume_from_checkpoint = {resume_from}: there is no such folder")
    elif last:
        raise ConfigError(
            f"{folder} already holds {last[0].name}: resume with trainer.resume_from_checkpoint=true, choose a "
            "different output_dir, or delete the folder"
        )


def checkpoint_to_resume(
    resume_from: bool | str | Path | None, folder: Path, find_faults: Callable[[Path], list[str]] = faults_of
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the checkpoint to resume: the last one whose files are all unchanged since they were written.

    Args:
        resume_from: from `parse_resume`.
        folder: folder of the run.
        find_faults: returns the faults of a checkpoint, one line per fault.

    Returns:
        The checkpoint (None: start from the beginning), and the broken ones that were skipped, each with its faults.

    Raises:
        ConfigError: see `check_resume`; or no checkpoint is complete.
    """
    check_resume(resume_from, folder)
    if not resume_from:
        return None, []
    if resume_from is not True:
        faults = find_faults(Path(resume_from))
        if faults:
            raise ConfigError(
                f"trainer.resume_from_checkpoint = {resume_from}: the checkpoint is broken: {_first(faults)}; choose "
                "a different one"
            )
        return Path(resume_from), []
    broken: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        faults = find_faults(path)
        if not faults:
            return path, broken
        broken.append((path, _first(faults)))
    listed = "; ".join(f"{path.name}: {faults}" for path, faults in broken)
    raise ConfigError(
        f"trainer.resume_from_checkpoint: no checkpoint in {folder} is complete ({listed}); start a new run"
    )


def _first(faults: list[str], most: int = 3) -> str:
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return ", ".join(faults[:most]) + more


def mark_broken(checkpoint: Path) -> Path:
    """Rename a broken checkpoint, so that it is no longer listed as a checkpoint; return its new path."""
    target = checkpoint.with_name(BROKEN + checkpoint.name)
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def prune(folder: str | Path, keep: int | None, best: str | Path | None) -> None:
    """Delete the oldest checkpoints of a run, but neither the last nor the best one.

    Args:
        folder: folder of the run.
        keep: number of checkpoints to keep; None or 0 keeps all.
        best: path of the best checkpoint. Only its name is compared, because the folder may have been moved since.
    """
    found = checkpoints(folder)
    kept = {path.name for path in found[-1:]} | ({Path(best).name} if best else set())
    surplus = len(found) - max(keep, len(kept)) if keep else 0
    for path in found:
        if surplus > 0 and path.name not in kept:
            surplus -= 1
            old = path.with_name(f"{UNFINISHED}old-{path.name}")  # a partly deleted one must not look like a checkpoint
            with contextlib.suppress(OSError):  # a folder that cannot be deleted only costs disk space
                path.rename(old)
                shutil.rmtree(old)


def clear_unfinished(folder: str | Path) -> None:
    """Delete the checkpoints that a run had not finished writing when it ended."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


def clear_run(folder: str | Path) -> None:
    """Delete the files that an earlier run left in a folder, and no others.

    Raises:
        ConfigError: a run is writing to the folder.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    check_free(folder)
    clear_unfinished(folder)
    further = [*folder.glob(f"{BROKEN}checkpoint-*"), *folder.glob(FROZEN_FILE.replace(".", "-*."))]
    for path in [*(folder / name for name in OWN_FILES), *checkpoints(folder), *further]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
