"""A joint group whose labels are objects, attributes and numbers: all of one image move together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allinone_ds.data import train_transform
from allinone_ds.data.joint.batches import JointCollate
from allinone_ds.data.joint.dataset import TaskView
from allinone_ds.data.joint.sources import GroupSource, PairedSource
from allinone_ds.data.sources import open_source
from allinone_ds.tasks import TASKS
from benchmarks.heads.shapes import ATTRIBUTES, SIDE, write_shapes

KINDS = ["detection", "keypoints", "instances", "attributes", "regression"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, train=8, test=2)
    table = root / "train_numbers.jsonl"
    table.write_text(
        "".join(f"{line}\n" for line in table.read_text().splitlines()[:5])
    )  # three images without numbers
    coco = {"format": "coco", "annotations": "train.json"}
    labels = {
        "detection": coco,
        "keypoints": {**coco, "kind": "keypoints"},
        "instances": {**coco, "kind": "instances"},
        "attributes": {"format": "image_table", "kind": "attributes", "table": "train_attributes.csv"},
        "regression": {"format": "image_table", "kind": "regression", "table": table.name, "columns": ["objects"]},
    }
    source = PairedSource(format="joint", images="images/train", labels=labels, partial=True)  # type: ignore
    return open_source(GroupSource(group="shapes", tasks=KINDS, sources=[source]), Path(root))


def test_every_target_of_an_image_moves_with_its_pixels(dataset: Any) -> None:
    sample = dataset[0]
    flipped = train_transform([{"RandomHorizontalFlip": {"p": 1.0}}], (SIDE, SIDE), "joint")(sample)
    before, after = sample["targets"], flipped["targets"]
    x0, y0, x1, y1 = before["detection"]["boxes"].as_subclass(Tensor).unbind(1)
    mirrored = torch.stack([SIDE - x1, y0, SIDE - x0, y1], dim=1)
    for kind in ("detection", "keypoints", "instances"):
        torch.testing.assert_close(after[kind]["boxes"].as_subclass(Tensor), mirrored)
    assert torch.equal(after["instances"]["masks"], before["instances"]["masks"].flip(-1))
    points = before["keypoints"]["keypoints"].as_subclass(Tensor)[:, [0, 3, 2, 1]]  # tip, left, tail, right
    expected = torch.stack([SIDE - points[..., 0], points[..., 1]], dim=-1)
    torch.testing.assert_close(after["keypoints"]["keypoints"].as_subclass(Tensor), expected)
    assert torch.equal(
        after["attributes"]["attributes"].nan_to_num(-1), before["attributes"]["attributes"].nan_to_num(-1)
    )


def test_batches_without_a_label_of_a_task_have_an_empty_one(dataset: Any) -> None:
    classes = {kind: TASKS[kind] for kind in KINDS}
    collate = JointCollate({t: c.collate for t, c in classes.items()}, {t: c.unlabelled for t, c in classes.items()})
    batch = collate([dataset[index] for index in (6, 7)])
    assert batch["labelled"]["regression"] == 0 and batch["labels"]["regression"].shape == (1, 0)
    assert batch["labels"]["attributes"].shape == (2, len(ATTRIBUTES))
    assert len(batch["labels"]["instances"]) == len(batch["labels"]["keypoints"]) == 2
    for kind in KINDS:
        bare = {key: dataset[0][key] for key in ("image", "path", "index")}
        assert len(collate.collates[kind]([collate.unlabelled[kind](bare)])["pixel_values"]) == 1


def test_annotations_in_memory_are_counted_without_reading_images(
    dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr("allinone_ds.data.formats.common.numbered_files.read_image", unread)
    monkeypatch.setattr("allinone_ds.data.joint.dataset.read_image", unread)
    view = TaskView(dataset, "attributes")
    assert view.in_memory and len(view.annotation(0)["attributes"]) == len(ATTRIBUTES)
