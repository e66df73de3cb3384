"""The checkpoints in a run's folder: listing, choosing one to resume, deleting old ones. Quick to import."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.lock import check_free
from allinone_ds.run_folder.manifest import faults_of
from allinone_ds.run_folder.names import BROKEN, OWN_FILES, UNFINISHED


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
