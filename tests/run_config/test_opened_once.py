"""`check`, `plan` and `preview` open the sources of a joint group once, not once per task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from allinone_ds import cli
from allinone_ds.data.formats.coco import CocoSource
from allinone_ds.data.joint.sources import PairedSource
from tests.joint_set import CLASSES, joint_run, make_joint_set


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are opened, by the format and, of a group, by its images."""
    found: list[str] = []
    for cls in (PairedSource, CocoSource):

        def counting(source: Any, *args: Any, before: Any = cls.open) -> Any:
            found.append(f"{source.format} {source.images}")
            return before(source, *args)

        monkeypatch.setattr(cls, "open", counting)
    return found


def test_a_group_is_opened_once_per_part(tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make_joint_set(tmp_path / "data")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(joint_run(tmp_path), sort_keys=False))
    once = ["joint train/images", "coco train/images"], ["joint test/images", "coco test/images"]
    assert cli.main(["check", str(file)]) == 0
    assert opened == [*once[0], *once[1]]
    said = capsys.readouterr().out
    assert "2 datasets read: 0 errors" in said and "task 'det': 7 of 12 images have a label of it" in said
    opened.clear()
    assert cli.main(["plan", str(file), "--gpus", "4"]) == 0
    assert opened == once[0]
    opened.clear()
    given = [f"{task}:{len(names)}" for task, names in CLASSES.items()]
    assert cli.main(["plan", str(file), "--gpus", "4", "--classes", *given]) == 0 and opened == []
    assert cli.main(["preview", str(file), "--output", str(tmp_path / "p.png"), "--samples", "2"]) == 0
    assert opened == once[0]


def test_what_cannot_be_opened_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_joint_set(tmp_path / "data")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(joint_run(tmp_path), sort_keys=False))
    (tmp_path / "data" / "test" / "boxes.json").unlink()
    assert cli.main(["check", str(file)]) == 1
    said = capsys.readouterr().out
    assert said.count("boxes.json: file is missing") == 1 and "1 errors" in said
    assert cli.main(["plan", str(file), "--gpus", "4", "data_root=/nowhere"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: det: its data cannot be read" in said and "note: seg: its data cannot" not in said
