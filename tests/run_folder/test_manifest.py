"""The manifest of a checkpoint names every kind of damage."""

from __future__ import annotations

import shutil
from pathlib import Path

from allinone_ds.run_folder.manifest import MANIFEST_FILE, faults_of
from tests.run_folder.small_checkpoint import checkpoint


def test_a_manifest_finds_every_kind_of_damage(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 1)
    assert faults_of(good) == []
    (good / "extra").write_text("nobody minds")
    assert faults_of(good) == []
    for name, damage, word in (
        ("weights", lambda p: p.write_bytes(p.read_bytes()[:-1]), "199 bytes, 200 were written"),
        ("weights", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\0"), "checksum of weights differs"),
        ("inner/state", lambda p: p.unlink(), "is missing"),
        (MANIFEST_FILE, lambda p: p.write_text(p.read_text()[:-9]), "cannot be read"),
        (MANIFEST_FILE, lambda p: p.unlink(), "save did not finish"),
    ):
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        damage(bad / name)
        found = faults_of(bad)
        assert len(found) == 1 and word in found[0], found
        assert {f for part in range(3) for f in faults_of(bad, part, 3)} == set(found)
        shutil.rmtree(bad)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, 1) / MANIFEST_FILE
    content = file.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert len(faults_of(tmp_path / "checkpoint-1")) == 1, (
            f"byte {place}: {bytes(changed[place - 9 : place + 9])!r}"
        )
