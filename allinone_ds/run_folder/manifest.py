"""The manifest of a checkpoint: size and checksum of every file, to detect a broken checkpoint. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_BLOCK = 2**22  # bytes per read


def files_of(folder: Path) -> list[str]:
    """Return the files below a folder except the manifest, as sorted relative names."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if name != MANIFEST_FILE)


def file_entry(file: Path) -> dict[str, Any]:
    """Return the manifest entry of a file: {"bytes": size, "blake2b": checksum}."""
    checksum = hashlib.blake2b(digest_size=20)
    size = 0
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            checksum.update(block)
            size += len(block)
    return {"bytes": size, "blake2b": checksum.hexdigest()}


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, files: Mapping[str, dict[str, Any]], **entries: Any) -> None:
    """Write the manifest, which includes a checksum of its own content, and sync it.

    Args:
        folder: folder of the checkpoint.
        files: the result of `file_entry` per relative name.
        entries: further entries, such as the step.
    """
    target = folder / MANIFEST_FILE
    content = {**entries, "files": dict(sorted(files.items()))}
    target.write_text(json.dumps({"blake2b": _checksum(content), **content}, indent=1) + "\n")
    sync(target)


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest's content, independent of its formatting."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=20).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest.

    Raises:
        ValueError: the manifest is missing or damaged; the message says why.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text())
        written = content.pop("blake2b")
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST_FILE}, so the save did not finish") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})") from None
    if _checksum(content) != written:
        raise ValueError(f"the checksum of {MANIFEST_FILE} differs from the one that was written")
    return content


def faults_of(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Return the faults of a checkpoint: every file that is missing or has changed since it was written.

    Args:
        folder: folder of the checkpoint.
        part: index of the part of the files to read, 0..parts-1.
        parts: number of parts that the files are divided into, one per rank.

    Returns:
        One line per fault, each naming the file; empty if the checkpoint is complete.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return [str(error)]
    faults = []
    for name in sorted(files)[part::parts]:
        expected = files[name]
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                faults.append(f"{name} has {size} bytes, {expected['bytes']} were written")
            elif file_entry(folder / name) != expected:
                faults.append(f"the checksum of {name} differs from the one that was written")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror or error}")
    return faults
