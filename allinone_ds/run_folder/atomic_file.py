"""Files that are written whole or not at all. Quick to import."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; after the block it replaces `target`, unless the block raised.

    Args:
        target: the file; its folder exists.

    Example:
        >>> with atomic_path("metrics.json") as scratch:
        ...     size = scratch.write_text("{}")
    """
    target = Path(target)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_atomically(target: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(target) as scratch:
        scratch.write_text(text)
