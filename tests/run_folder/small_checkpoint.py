"""A checkpoint of two small files, for tests of the folder of a run."""

from __future__ import annotations

from pathlib import Path

from allinone_ds.run_folder.manifest import file_entry, files_of, write_manifest


def checkpoint(folder: Path, step: int) -> Path:
    """Write a small complete checkpoint of a step into the folder of a run; return its path."""
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(200)))
    (path / "inner" / "state").write_text(f"step {step}")
    write_manifest(path, {name: file_entry(path / name) for name in files_of(path)}, step=step)
    return path
