"""Contact sheets: one row per branch, one column per sample, labels drawn at their place."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import tv_tensors

from allinone_ds import cli
from allinone_ds.reporting.preview import draw_sample
from allinone_ds.tasks.detection import DetectionTask
from allinone_ds.tasks.segmentation import SegmentationTask

BRANCHES = {
    "branches": {
        "white": {"probability": 0.75, "transforms": [{"ColorJitter": {"brightness": [99, 99]}}]},
        "mosaic": {"probability": 0.25, "transforms": ["Mosaic", "LargeScaleJitter"]},
    }
}


def test_a_task_gets_a_sheet_with_one_row_per_branch(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((home / "tiny.yaml").read_text())
    shutil.copytree(home / "data", tmp_path / "data")
    for image in sorted((tmp_path / "data" / "detection" / "train").glob("*.jpg"))[:9]:
        image.write_bytes(image.read_bytes()[:200])
    content["data_root"] = str(tmp_path / "data")
    content["tasks"]["det"]["augment"] = content["tasks"]["seg"]["augment"] = BRANCHES
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    start = torch.get_rng_state()
    command = ["preview", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "new" / "p.png"), "--samples", "3"]
    assert cli.main(command) == 0
    assert torch.equal(torch.get_rng_state(), start)
    printed = capsys.readouterr().out
    heights = {}
    for task in ("det", "seg", "cls"):
        file = tmp_path / "new" / f"p-{task}.png"
        assert str(file) in printed
        sheet = np.array(Image.open(file))
        assert sheet.shape[1] == 3 * 326 + 6
        heights[task] = sheet.shape[0]
    row = heights["det"] - heights["cls"]  # three rows, and two: plain resize and the only branch
    assert heights["det"] == heights["seg"] and heights["cls"] == 2 * row + 6
    white = np.array(Image.open(tmp_path / "new" / "p-det.png"))[row + 60 : 2 * row]
    assert (white == 255).mean() > 0.6 > (np.array(Image.open(tmp_path / "new" / "p-det.png"))[60:row] == 255).mean()
    before = (tmp_path / "new" / "p-det.png").read_bytes()
    assert cli.main(command) == 0
    assert (tmp_path / "new" / "p-det.png").read_bytes() == before


def test_boxes_and_masks_are_drawn_on_their_pixels() -> None:
    image = tv_tensors.Image(torch.full((3, 40, 80), 100, dtype=torch.uint8))
    box = tv_tensors.BoundingBoxes([[20.0, 10.0, 60.0, 30.0]], format="XYXY", canvas_size=(40, 80))
    drawn = draw_sample({"image": image, "boxes": box, "labels": torch.tensor([0])}, ["sign"], DetectionTask)
    changed = (drawn[:, 21:] != 100).any(dim=0)  # below the line of text; the picture is 4 times as large
    assert changed.shape == (160, 320)
    ys, xs = torch.where(changed)
    assert abs(int(xs.min()) - 80) <= 2 and abs(int(xs.max()) - 240) <= 2 and abs(int(ys.max()) - 120) <= 2
    mask = tv_tensors.Mask(torch.zeros(40, 80, dtype=torch.uint8))
    mask[:, 40:] = 255
    before = image.clone()
    drawn = draw_sample({"image": image, "mask": mask}, ["road"], SegmentationTask)[:, 21:]
    assert (drawn[:, :, 170:] == 25).all() and (drawn[:, :, :150] != 100).any(dim=0).all()
    assert torch.equal(image, before)


def test_a_sheet_needs_a_pictures_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", str(home / "tiny.yaml"), "--output", "sheet.pdf"]) == 2
    assert "sheet.pdf" in capsys.readouterr().err
