"""The manifest of a checkpoint: size and checksum of every file, so that no broken one is resumed. Quick to import."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_BLOCK = 2**22  # bytes read at once


def files_of(folder: Path) -> list[str]:
    """Every file below a folder but the manifest, relative to it, sorted."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if name != MANIFEST_FILE)


def measure(file: Path) -> dict[str, Any]:
    """{"bytes": size, "blake2b": checksum} of a file."""
    checksum = hashlib.blake2b(digest_size=20)
    size = 0
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            checksum.update(block)
            size += len(block)
    return {"bytes": size, "blake2b": checksum.hexdigest()}


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, files: Mapping[str, dict[str, Any]], **facts: Any) -> None:
    """Write the manifest, with a checksum of its own, and sync it.

    Args:
        folder: of the checkpoint.
        files: what `measure` gave, by relative name.
        facts: further entries, such as the step.
    """
    target = folder / MANIFEST_FILE
    content = {**facts, "files": dict(sorted(files.items()))}
    target.write_text(json.dumps({"blake2b": _checksum(content), **content}, indent=1) + "\n")
    sync(target)


def _checksum(content: Mapping[str, Any]) -> str:
    """Of a manifest's content, however it is written down."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=20).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: there is none, or it is not one; says why.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text())
        written = content.pop("blake2b")
    except FileNotFoundError:
        raise ValueError(f"has no {MANIFEST_FILE}, so it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})") from None
    if _checksum(content) != written:
        raise ValueError(f"{MANIFEST_FILE} has another checksum than when it was written")
    return content


def faults_of(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint; empty when every file is as it was written.

    Args:
        folder: of the checkpoint.
        part: which share of the files to read, 0..parts-1.
        parts: how many share the reading.

    Returns:
        One line a fault, each naming the file.
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
            elif measure(folder / name) != expected:
                faults.append(f"{name} has another checksum than when it was written")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror or error}")
    return faults
