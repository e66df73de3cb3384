"""DeepSpeed's checkpoint files: written so that every rank ends its save, read without running code from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.checkpoint.layout import read_file

Take = Callable[[Any, Path], None]
"""Gets a file's content and its path, and writes it now or later."""


class CheckpointFiles(TorchCheckpointEngine):
    """DeepSpeed's own reader and writer of files, with two differences.

    Reading is `read_file`, because DeepSpeed's own would run any code that a file holds. During `save_engine` a failed
    write is noted, not raised: a rank that left `save_checkpoint` early would leave the others waiting in its barriers.
    """

    def __init__(self, own: TorchCheckpointEngine) -> None:
        super().__init__()
        self.zipfile_serialization = own.zipfile_serialization
        self.errors: list[str] | None = None
        """Where failed writes are noted; None: they are raised."""
        self.take: Take | None = None
        """Gets what would be written; None: it is written."""

    def save(self, state_dict: Any, path: str) -> None:
        if self.take is not None:
            self.take(state_dict, Path(path))
            return
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's own file writer raises the second
            if self.errors is None:
                raise
            self.errors.append(f"{Path(path).name}: {error}")

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_file(path, map_location, mmap=False)


def own_checkpoint_files(engine: Any) -> CheckpointFiles:
    """Give an engine `CheckpointFiles`; returns them.

    Args:
        engine: a DeepSpeedEngine.

    Raises:
        UnsupportedEngine: its config asks for a writer whose files may not be complete when the save returns.
    """
    own = engine.checkpoint_engine
    if isinstance(own, CheckpointFiles):
        return own
    if type(own) is not TorchCheckpointEngine:
        raise UnsupportedEngine(
            f"DeepSpeed's {type(own).__name__} is not supported: checkpoints must be complete when the save returns; "
            "take 'checkpoint.writer' and 'datastates_ckpt' out of the DeepSpeed config"
        )
    engine.checkpoint_engine = CheckpointFiles(own)
    return engine.checkpoint_engine


def save_engine(engine: Any, folder: Path, take: Take | None = None) -> list[str]:
    """`engine.save_checkpoint`, which every rank leaves at its end even when it could not write. Collective.

    Args:
        engine: a DeepSpeedEngine.
        folder: where to; it exists.
        take: gets the content of every file instead of its being written. Tensors in it are the engine's own: whoever
            writes them after the next step began copies them first.

    Returns:
        What this rank could not write, one line a file.
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
        engine.save_checkpoint(str(folder), save_latest=False)
    finally:
        files.errors = files.take = None
        del engine._copy_recovery_script
    if dist.get_rank() == 0:
        try:
            (folder / "latest").write_text(f"global_step{engine.global_steps}")
        except OSError as error:
            errors.append(f"latest: {error}")
    return errors
