"""A file that marks a folder as demo data, and says whether it is complete."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARKER = "demo.json"


@contextlib.contextmanager
def folder_to_fill(root: Path, wanted: Mapping[str, Any], folders: Sequence[str]) -> Iterator[bool]:
    """Give whether demo data is to be written inside this context, after which the folder is complete.

    Earlier demo data of another content is deleted first.

    Args:
        root: folder of the data; it is created if necessary.
        wanted: what decides the content, plain values for JSON.
        folders: folders in it that will be written.

    Raises:
        FileExistsError: one of the folders exists, and the marker does not name it as demo data.
    """
    marker = root / MARKER
    wanted = json.loads(json.dumps({**wanted, "folders": list(folders)}))
    found = json.loads(marker.read_text()) if marker.exists() else None
    if found == {**wanted, "complete": True}:
        yield False
        return
    for name in folders:
        if (root / name).exists():
            if found is None or name not in found.get("folders", folders):
                raise FileExistsError(
                    f"{root / name} exists and {marker} does not name it, so it is not demo data; give a different "
                    "folder"
                )
            shutil.rmtree(root / name)
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**wanted, "complete": False}))
    yield True
    marker.write_text(json.dumps({**wanted, "complete": True}))
