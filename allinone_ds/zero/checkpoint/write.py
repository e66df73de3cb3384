"""DeepSpeed's checkpoint files: every rank finishes its save, and reading runs no code from the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.checkpoint.layout import read_file

Take = Callable[[Any, Path], None]
"""Receives the content and the path of a file, and writes it now or later."""


class CheckpointFiles(TorchCheckpointEngine):
    """DeepSpeed's own reader and writer of files, with two differences.

    Reading is `read_file`, where DeepSpeed's own reader would run any code in a file. During `save_engine` a failed
    write is recorded, not raised: when a rank leaves `save_checkpoint` early, the others wait in its barriers.

    Args:
        own: the reader and writer that the engine has.

    Attributes:
        errors: where failed writes are recorded; None: they are raised.
        take: receives what would be written; None: it is written.
    """

    def __init__(self, own: TorchCheckpointEngine) -> None:
        super().__init__()
        self.zipfile_serialization = own.zipfile_serialization
        self.errors: list[str] | None = None
        self.take: Take | None = None

    def save(self, state_dict: Any, path: str) -> None:
        if self.take is not None:
            self.take(state_dict, Path(path))
            return
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's file writer raises RuntimeError
            if self.errors is None:
                raise
            self.errors.append(f"{Path(path).name}: {error}")

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_file(path, map_location, mmap=False)


def own_checkpoint_files(engine: Any) -> CheckpointFiles:
    """Make an engine read and write through `CheckpointFiles`, and return them.

    Args:
        engine: a DeepSpeedEngine.

    Raises:
        UnsupportedEngine: its config asks for a writer whose files may be incomplete when the save returns.
    """
    own = engine.checkpoint_engine
    if isinstance(own, CheckpointFiles):
        return own
    if type(own) is not TorchCheckpointEngine:
        raise UnsupportedEngine(
            f"DeepSpeed's {type(own).__name__} is not supported: checkpoints must be complete when the save returns; "
            "remove 'checkpoint.writer' and 'datastates_ckpt' from the DeepSpeed config"
        )
    engine.checkpoint_engine = CheckpointFiles(own)
    return engine.checkpoint_engine


def save_engine(engine: Any, folder: Path, take: Take | None = None, frozen: bool = True) -> list[str]:
    """Call `engine.save_checkpoint` such that every rank finishes it, even one that could not write. Collective.

    Args:
        engine: a DeepSpeedEngine.
        folder: to write to; it exists.
        take: receives the content of every file, which is then not written. Its tensors are the engine's own: copy them
            before the next step to write them later.
        frozen: whether to write the frozen parameters too.

    Returns:
        What this rank could not write, one line per file.
    """
    files = own_checkpoint_files(engine)
    errors: list[str] = []

    def copy_recovery_script(save_path: str) -> None:
        try:
            type(engine)._copy_recovery_script(engine, save_path)
        except OSError as error:
            errors.append(f"the recovery scripts: {error}")

    files.errors, files.take = errors, take
    engine._copy_recovery_script = copy_recovery_script
    try:
        engine.save_checkpoint(str(folder), save_latest=False, exclude_frozen_parameters=not frozen)
    finally:
        files.errors = files.take = None
        del engine._copy_recovery_script
    if dist.get_rank() == 0:
        try:
            (folder / "latest").write_text(f"global_step{engine.global_steps}")
        except OSError as error:
            errors.append(f"latest: {error}")
    return errors
