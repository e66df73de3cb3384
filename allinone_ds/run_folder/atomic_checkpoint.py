"""Checkpoints that are whole or not there: written under another name, synced, measured, then renamed. All ranks."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from allinone_ds.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from allinone_ds.errors import ConfigError, RunError
from allinone_ds.run_folder.checkpoints import checkpoint_to_resume, checkpoints, set_aside
from allinone_ds.run_folder.lock import claim
from allinone_ds.run_folder.manifest import faults_of, files_of, measure, sync, write_manifest
from allinone_ds.run_folder.names import UNFINISHED

_FULL = 2**16  # bytes; a disk with less is called full


class CheckpointWriter:
    """One checkpoint on its way to the disk; every rank makes one and calls its methods in the same order.

        writer = CheckpointWriter(run, step)       # RUN/.unfinished-checkpoint-STEP
        with writer.noting("weights"):
            ...                                    # write into writer.folder
        writer.publish()                           # RUN/checkpoint-STEP

    A rank that cannot write notes it and goes on, so that no other rank waits for it for ever; `agree` and `publish`
    then raise on every rank.

    Args:
        run: folder of the run, on a file system that all ranks share.
        step: of the checkpoint.
        group: process group of its collectives; None is that of training.

    Attributes:
        folder: where the files are written.
        target: where they are once all of them are on the disk.

    Raises:
        RunError: the folder cannot be made, or not all ranks see it.
    """

    def __init__(self, run: Path, step: int, group: Any = None) -> None:
        self.run = run
        self.step = step
        self.group = group
        self.target = run / f"checkpoint-{step}"
        self.folder = run / f"{UNFINISHED}{self.target.name}"
        self._errors: list[str] = []
        if rank() == 0:
            with self.noting("the folder"):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
        self.agree()
        if not self.folder.is_dir():
            self._errors.append(f"{self.run} is not the folder that rank 0 writes to; all ranks must share it")
        self.agree()

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note a failed write of `what` instead of raising it. No collective may run within it.

        A RuntimeError is taken for a failed write too: torch's and safetensors' writers raise nothing more exact.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.note(f"{what}: {error}")
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            self.note(f"{what}: {error}")

    def note(self, *errors: str) -> None:
        """Note failed writes of this rank."""
        full = _free_bytes(self.run) < _FULL  # torch's file writer says "unexpected pos" then
        self._errors += [f"no space left on device for {error}" if full else error for error in errors]

    def agree(self) -> None:
        """Raise on every rank when any rank noted a failed write; the unfinished folder is then deleted.

        Raises:
            RunError: names the ranks, what they could not write, and what is left.
        """
        found = [
            f"rank {number}: {error}"
            for number, errors in enumerate(gather_objects(self._errors, self.group))
            for error in errors[:1]
            if error
        ]
        if not found:
            return
        free = f"{_free_bytes(self.run) / 2**20:,.1f} MiB"
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        earlier = checkpoints(self.run)
        kept = f"{earlier[-1].name} is untouched" if earlier else "there is no earlier checkpoint"
        more = f" (and {len(found) - 3} more ranks)" if len(found) > 3 else ""
        raise RunError(
            f"the checkpoint of step {self.step} could not be written to {self.run}: {'; '.join(found[:3])}{more}; "
            f"{free} are free there. {kept}; make room or repair the disk, then go on with --resume",
            on_all_ranks=True,
        )

    def publish(self, **facts: Any) -> None:
        """Sync and measure every file (each rank a share of them), write the manifest, then rename. Collective.

        Args:
            facts: further entries of the manifest.

        Raises:
            RunError: as `agree`.
        """
        barrier(self.group)
        names: list[str] = []
        if rank() == 0:
            names = files_of(self.folder)
        names = broadcast_object(names, self.group)
        mine: dict[str, dict[str, Any]] = {}
        with self.noting("the manifest"):
            for name in names[rank() :: world_size()]:
                sync(self.folder / name)
                mine[name] = measure(self.folder / name)
        self.agree()
        files = {name: facts for part in gather_objects(mine, self.group) for name, facts in part.items()}
        if rank() == 0:
            with self.noting("the manifest"):
                write_manifest(self.folder, files, step=self.step, world_size=world_size(), **facts)
                for folder in sorted({(self.folder / name).parent for name in files} | {self.folder}):
                    sync(folder)
                old = self.target.with_name(f"{UNFINISHED}old-{self.target.name}")
                if self.target.exists():  # written by an earlier life of the run that went further
                    shutil.rmtree(old, ignore_errors=True)
                    self.target.rename(old)
                os.rename(self.folder, self.target)
                sync(self.run)
                shutil.rmtree(old, ignore_errors=True)
        self.agree()


def claim_run(run: Path) -> None:
    """`folder.claim` by rank 0; what it raises, every rank raises. Collective.

    Raises:
        ConfigError: another run writes to the folder, or nothing can be written there.
    """
    problem = ""
    if rank() == 0:
        try:
            claim(run)
        except ConfigError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise ConfigError(problem)


def choose_checkpoint(asked: Any, run: Path) -> tuple[Path | None, list[str]]:
    """`checkpoint_to_resume`, the reading shared out over the ranks; broken checkpoints get another name. Collective.

    Args:
        asked: `trainer.resume_from_checkpoint`.
        run: folder of the run.

    Returns:
        The checkpoint, and what to tell the user about broken ones.

    Raises:
        ConfigError: as `checkpoint_to_resume`, on every rank.
    """

    def find_faults(path: Path) -> list[str]:
        # ranks list the same checkpoints in the same order, so they come here together
        return sorted({fault for part in gather_objects(faults_of(path, rank(), world_size())) for fault in part})

    found, broken = checkpoint_to_resume(asked, run, find_faults)
    barrier()
    words = []
    for path, faults in broken:
        if rank() == 0:
            set_aside(path)
        start = found.name if found else "the beginning"
        words.append(f"{path.name} is broken ({faults}), going on from {start}; it is now broken-{path.name}")
    barrier()
    return found, words


def _free_bytes(folder: Path) -> float:
    """Bytes that are free on the folder's disk; infinity where nobody knows."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf
