"""Replace a file atomically. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` after the block, unless the block raised.

    Args:
        target: the file to replace; its folder exists.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "metrics.json"
        ...     with atomic_path(file) as temporary:
        ...         size = temporary.write_text("{}")
        ...     file.read_text()
        '{}'
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(target: str | Path, text: str) -> None:
    """Replace a text file atomically.

    Args:
        target: the file; its folder exists.
        text: the new content.
    """
    with atomic_path(target) as temporary:
        temporary.write_text(text)
