"""Write a checkpoint of all ranks atomically: temporary folder, fsync, manifest, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from allinone_ds.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from allinone_ds.errors import RunError
from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.run_folder.disk import free_bytes, is_full
from allinone_ds.run_folder.manifest import file_entry, files_of, sync, write_manifest
from allinone_ds.run_folder.names import UNFINISHED


class CheckpointWriter:
    """Writes one checkpoint; every rank constructs one and calls its methods in the same order.

    The files are written to RUN/.unfinished-checkpoint-STEP. `publish` renames that folder to RUN/checkpoint-STEP
    after all files are on the disk, so an interrupted save never leaves a partial RUN/checkpoint-STEP. A rank that
    cannot write a file records the error and continues, because the other ranks would otherwise wait for it in a
    collective; `raise_recorded` and `publish` then raise on every rank.

    Args:
        run: folder of the run, on a file system that all ranks share.
        step: optimizer step of the checkpoint.
        group: process group for the collectives; None is the default group.

    Attributes:
        folder: folder to write the files to.
        target: folder that `publish` renames it to.

    Raises:
        RunError: the folder cannot be created, or a rank does not see it.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as run:
        ...     writer = CheckpointWriter(Path(run), step=4)
        ...     with writer.recording("weights"):
        ...         size = (writer.folder / "weights.bin").write_bytes(b"1234")
        ...     writer.publish()
        ...     sorted(path.name for path in writer.target.iterdir())
        ['manifest.json', 'weights.bin']
    """

    def __init__(self, run: Path, step: int, group: Any = None) -> None:
        self.run = run
        self.step = step
        self.group = group
        self.target = run / f"checkpoint-{step}"
        self.folder = run / f"{UNFINISHED}{self.target.name}"
        self._errors: list[str] = []
        if rank() == 0:
            with self.recording("the folder"):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
        self.raise_recorded()
        if not self.folder.is_dir():
            self._errors.append(f"{self.run} is not the folder that rank 0 writes to; all ranks must share it")
        self.raise_recorded()

    @contextlib.contextmanager
    def recording(self, what: str) -> Iterator[None]:
        """Record a failed write instead of raising it. The block must not contain a collective.

        A RuntimeError counts as a failed write: the file writer of torch raises nothing more specific.

        Args:
            what: name of the content, for the message.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            self.record(f"{what}: {error}")

    def record(self, *errors: str) -> None:
        """Record failed writes of this rank."""
        full = is_full(self.run)  # the file writer of torch only says "unexpected pos" then
        self._errors += [f"no space left on device for {error}" if full else error for error in errors]

    def raise_recorded(self) -> None:
        """Raise on every rank if any rank recorded a failed write; delete the unfinished folder first. Collective.

        Raises:
            RunError: names the ranks, what they could not write and which checkpoint remains.
        """
        failed = [
            f"rank {number}: {errors[0]}"
            for number, errors in enumerate(gather_objects(self._errors, self.group))
            if errors
        ]
        if not failed:
            return
        free = f"{free_bytes(self.run) / 2**20:,.1f} MiB"
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        earlier = checkpoints(self.run)
        kept = f"{earlier[-1].name} is unchanged" if earlier else "there is no earlier checkpoint"
        more = f" (and {len(failed) - 3} more ranks)" if len(failed) > 3 else ""
        raise RunError(
            f"the checkpoint of step {self.step} could not be written to {self.run}: {'; '.join(failed[:3])}{more}; "
            f"{free} are free on that disk. {kept}; free some space or repair the disk, then resume with --resume",
            on_all_ranks=True,
        )

    def publish(self, **entries: Any) -> None:
        """Sync all files, write the manifest, then rename the folder to its final name. Collective.

        The ranks divide the work of syncing the files and computing their checksums.

        Args:
            entries: further entries of the manifest.

        Raises:
            RunError: see `raise_recorded`.
        """
        barrier(self.group)
        names = broadcast_object(files_of(self.folder) if rank() == 0 else [], self.group)
        mine: dict[str, dict[str, Any]] = {}
        with self.recording("the manifest"):
            for name in names[rank() :: world_size()]:
                sync(self.folder / name)
                mine[name] = file_entry(self.folder / name)
        self.raise_recorded()
        files = {name: entry for part in gather_objects(mine, self.group) for name, entry in part.items()}
        if rank() == 0:
            with self.recording("the manifest"):
                write_manifest(self.folder, files, step=self.step, world_size=world_size(), **entries)
                for folder in sorted({(self.folder / name).parent for name in files} | {self.folder}):
                    sync(folder)
                self._rename()
        self.raise_recorded()

    def _rename(self) -> None:
        old = self.target.with_name(f"{UNFINISHED}old-{self.target.name}")
        if self.target.exists():  # an earlier start of the run reached this step before it resumed from a lower one
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
        os.rename(self.folder, self.target)
        sync(self.run)
        shutil.rmtree(old, ignore_errors=True)
