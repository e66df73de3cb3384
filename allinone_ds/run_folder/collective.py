"""Steps of a start that all ranks take together: lock the folder of the run, choose the checkpoint to resume."""

from __future__ import annotations

from pathlib import Path

from allinone_ds.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.checkpoints import checkpoint_to_resume, mark_broken
from allinone_ds.run_folder.lock import lock_folder
from allinone_ds.run_folder.manifest import faults_of


def lock_run(run: Path) -> None:
    """Lock the folder of a run by rank 0; every rank raises what rank 0 raises. Collective.

    Raises:
        ConfigError: see `lock_folder`.
    """
    problem = ""
    if rank() == 0:
        try:
            lock_folder(run)
        except ConfigError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise ConfigError(problem)


def find_faults(checkpoint: Path) -> list[str]:
    """Return what `faults_of` finds in a checkpoint; each rank reads a part of the files. Collective."""
    return sorted({fault for part in gather_objects(faults_of(checkpoint, rank(), world_size())) for fault in part})


def choose_checkpoint(resume_from: bool | str | Path | None, run: Path) -> tuple[Path | None, list[str]]:
    """Choose the checkpoint to resume, and rename the broken ones that were skipped. Collective.

    Args:
        resume_from: from `parse_resume`.
        run: folder of the run.

    Returns:
        The checkpoint (None: start from the beginning), and one warning per broken checkpoint.

    Raises:
        ConfigError: see `checkpoint_to_resume`; raised on every rank.
    """
    chosen, broken = checkpoint_to_resume(resume_from, run, find_faults)
    barrier()
    warnings = []
    for path, faults in broken:
        if rank() == 0:
            mark_broken(path)
        start = chosen.name if chosen else "the beginning"
        warnings.append(f"{path.name} is broken ({faults}): resuming from {start}; it was renamed broken-{path.name}")
    barrier()
    return chosen, warnings
