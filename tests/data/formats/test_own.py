"""A dataset class of one's own, named in the run's file, is the source of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import tv_tensors

from allinone_ds.data import OwnSource, SampleDataset, open_source
from allinone_ds.data.augmentation.objects import Points, corner
from allinone_ds.data.check import check_sources
from allinone_ds.data.combination import combine
from allinone_ds.data.dense_maps import DenseMap, EdgeMap, NormalMap
from allinone_ds.data.inspection.samples import joint_sample_fault
from allinone_ds.errors import DataError
from allinone_ds.tasks import TASKS


class Shades(SampleDataset):
    """Grey images, dark or bright."""

    kind = "classification"

    def __init__(self, root: Path, count: int = 2) -> None:
        self.name, self.count, self.classes = str(root / "shades"), count, ["dark", "bright"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = tv_tensors.Image(torch.full((3, 4, 4), 40 * index, dtype=torch.uint8))
        return {"image": image, "label": index % 2, "path": self.path(index), "index": index}


def own(**keys: Any) -> OwnSource:
    return OwnSource(**{"format": "class", "dataset": f"{__name__}:Shades", **keys})


def test_it_is_opened_with_the_root_and_its_options(tmp_path: Path) -> None:
    dataset = open_source(own(options={"count": 5}, expect={"samples": 5}), tmp_path)
    assert len(dataset) == 5 and dataset[3]["label"] == 1 and dataset.path(3) == f"{tmp_path}/shades#3"
    several = open_source(combine([own(), own(options={"count": 3})]), tmp_path, ["dark", "bright"])
    assert len(several) == 5


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"dataset": "no_such_module:Shades"},
            "No module named 'no_such_module'; is the folder of the module on PYTHON",
        ),
        ({"dataset": f"{__name__}:Shade"}, "has no attribute 'Shade'"),
        ({"dataset": f"{__name__}:own"}, "is no subclass of allinone_ds.data.SampleDataset"),
        ({"options": {"number": 3}}, "its __init__ takes root, the folder data_root, and the options"),
        ({"expect": {"samples": 9}}, "holds 2 samples, expect.samples is 9"),
    ],
)
def test_what_cannot_be_opened_is_one_clear_line(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as failed:
        open_source(own(**keys), tmp_path)
    assert says in str(failed.value)


def test_classes_follow_the_train_set_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classes is \['dark', 'bright'\], those of the task .* \['bright', 'dark'\]"):
        open_source(own(), tmp_path, ["bright", "dark"])
    with pytest.raises(ValueError, match=r"write 'module:Class'"):
        own(dataset="shades.Shades")


class Anything(SampleDataset):
    """Samples of any kind, changed by a function of the test."""

    change: Any = staticmethod(lambda sample: sample)

    def __init__(self, root: Path, kind: str = "segmentation") -> None:
        self.kind, self.name = kind, "anything"
        self.classes = [] if kind in ("depth", "normals", "edges", "saliency") else ["a", "b"]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        image = tv_tensors.Image(torch.randint(0, 255, (3, 8, 6), dtype=torch.uint8))
        sample = {"image": image, "path": self.path(index), "index": index, **target(self.kind)}
        return type(self).change(sample)


def target(kind: str) -> dict[str, Any]:
    boxes = tv_tensors.BoundingBoxes([[1.0, 1, 4, 5]], format="XYXY", canvas_size=(8, 6))
    objects = {"boxes": boxes, "labels": torch.tensor([1]), "iscrowd": torch.tensor([False])}
    points = {
        "keypoints": Points(torch.ones(1, 3, 2), canvas_size=(8, 6)),
        "visible": torch.ones(1, 3, dtype=torch.uint8),
        "area": torch.ones(1),
        "mirrored": torch.zeros(1, 3, dtype=torch.long),
        "corner": corner((8, 6)),
    }
    given = torch.linspace(0, 1, 48).view(8, 6)
    return {
        "segmentation": {"mask": tv_tensors.Mask((given > 0.5).to(torch.uint8))},
        "depth": {"depth": DenseMap(given + 1)},
        "normals": {"normals": NormalMap(torch.tensor([0, 0.6, 0.8]).view(3, 1, 1).expand(3, 8, 6).clone())},
        "edges": {"edges": EdgeMap((given > 0.5).to(torch.uint8))},
        "saliency": {"saliency": tv_tensors.Mask((given > 0.5).to(torch.uint8))},
        "classification": {"label": 1},
        "retrieval": {"label": torch.tensor(1)},
        "attributes": {"attributes": torch.tensor([1.0, float("nan")])},
        "regression": {"value": [0.5, 3]},
        "detection": objects,
        "instances": {**objects, "masks": tv_tensors.Mask(torch.ones(1, 8, 6, dtype=torch.uint8))},
        "keypoints": {**objects, **points},
    }[kind]


KINDS = list(TASKS)
BOX = torch.tensor([[1.0, 1, 4, 5]])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_as_they_should_be_of_every_kind_pass(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_source(own(dataset=f"{__name__}:Anything", options={"kind": kind}), tmp_path)
    assert [p for p in check_sources({"it": dataset}, progress=False) if p.level == "error" and "#" in p.file] == []


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("segmentation", lambda s: None, "is a NoneType; return a dict with image, path, index and the target"),
        ("segmentation", lambda s: {k: v for k, v in s.items() if k != "image"}, "image is missing; give a tv_tensors"),
        ("segmentation", lambda s: s | {"image": s["image"][:1]}, "image is a .* uint8 .1, 8, 6.; give"),
        ("segmentation", lambda s: s | {"image": s["image"] / 255}, "image is a .* of float32"),
        ("segmentation", lambda s: s | {"path": None}, "path is None; give the file, or self.path"),
        ("segmentation", lambda s: s | {"mask": s["mask"][:4]}, "mask is a Tensor of uint8 .4, 6.; give a Mask"),
        ("segmentation", lambda s: s | {"mask": tv_tensors.Mask(s["mask"] + 1)}, "mask holds 2; allowed are 0..1"),
        ("depth", lambda s: s | {"depth": DenseMap(-s["depth"])}, "depth holds -1.*; allowed are .*NaN"),
        ("depth", lambda s: s | {"depth": tv_tensors.Mask(s["depth"])}, "give a DenseMap of float, 8 x 6"),
        ("normals", lambda s: s | {"normals": NormalMap(2 * s["normals"])}, "normals holds 1.2; allowed are -1.01"),
        ("edges", lambda s: s | {"edges": EdgeMap(9 * s["edges"])}, "edges holds 9; allowed are 0..1, and 255"),
        ("classification", lambda s: s | {"label": "a"}, "label is 'a'; allowed are 0..1, the places of the 2 classes"),
        ("attributes", lambda s: s | {"attributes": torch.ones(3)}, "give numbers, one per class .2., NaN where"),
        ("attributes", lambda s: s | {"attributes": [1, 2]}, "attributes holds 2; allowed are 0, 1 and NaN"),
        ("regression", lambda s: s | {"value": [1.0, float("inf")]}, "value holds an infinite number"),
        ("detection", lambda s: s | {"boxes": tv_tensors.BoundingBoxes(BOX, format="XYWH", canvas_size=(8, 6))},
         "boxes are in XYWH; give tv_tensors.BoundingBoxes in XYXY"),
        ("detection", lambda s: s | {"boxes": tv_tensors.BoundingBoxes(BOX, format="XYXY", canvas_size=(80, 60))},
         r"canvas_size of the boxes is \(80, 60\), the image is \(8, 6\)"),
        ("detection", lambda s: s | {"labels": torch.tensor([0, 1])}, "give one integer per box .1."),
        ("detection", lambda s: s | {"labels": torch.tensor([2])}, "labels holds 2; allowed are 0..1"),
        ("instances", lambda s: s | {"masks": None}, "masks is missing; give a tv_ten"),
        ("keypoints", lambda s: s | {"keypoints": torch.ones(1, 3, 2)}, "keypoints is a .*; give Points .1, P, 2."),
        ("keypoints", lambda s: s | {"visible": torch.ones(3)}, "visible is a .*; give a tensor .1, 3."),
    ],
)  # fmt: skip
def test_what_a_sample_lacks_is_said_when_the_data_is_opened_and_by_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: Any, says: str
) -> None:
    source = own(dataset=f"{__name__}:Anything", options={"kind": kind})
    monkeypatch.setattr(Anything, "change", staticmethod(change))
    with pytest.raises(DataError, match=f"anything#0: .*{says}"):
        open_source(source, tmp_path)
    found = [p for p in check_sources({"it": source}, tmp_path, progress=False) if "#" in p.file]
    assert [p.file for p in found] == ["anything#0", "anything#1"]


class Broken(Anything):
    def __init__(self, root: Path, how: str) -> None:
        super().__init__(root)
        if how == "init":
            raise RuntimeError("no licence file")
        self.kind = "segmentation" if how != "kind" else None  # type: ignore[assignment]
        self.how = how

    def __len__(self) -> int:
        return -1 if self.how == "length" else 2

    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("disk on fire")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("init", "its __init__ raised RuntimeError: no licence file"),
        ("kind", "its kind is None; set it to a str"),
        ("length", "__len__ raised ValueError"),
        ("item", "anything#0: reading it raised RuntimeError: disk on fire"),
    ],
)
def test_what_a_class_raises_is_one_clear_line(tmp_path: Path, how: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_source(own(dataset=f"{__name__}:Broken", options={"how": how}), tmp_path)


def test_samples_of_a_group(tmp_path: Path) -> None:
    kinds, classes = {"seg": "segmentation", "far": "depth"}, {"seg": ["a", "b"], "far": []}
    image = tv_tensors.Image(torch.zeros(3, 8, 6, dtype=torch.uint8))
    sample = {"image": image, "path": "1", "index": 0}
    targets = {"seg": target("segmentation"), "far": target("depth")}
    assert joint_sample_fault({**sample, "targets": targets}, kinds, classes) is None
    assert joint_sample_fault({**sample, "targets": {}}, kinds, classes) is None  # no label of any task
    for wrong, says in (
        ({**sample, **targets["seg"]}, "has no dict 'targets'; return task -> keys of its kind, for seg, far"),
        (
            {**sample, "targets": {**targets, "sge": {}}},
            "has targets of 'sge', which is no task of the group (seg, far)",
        ),
        ({**sample, "targets": {"far": {}}}, "targets['far']: depth is missing; give a DenseMap of float, 8 x 6"),
        ({**sample, "targets": {"far": None}}, "targets['far'] is a NoneType; give a dict with the keys of depth"),
    ):
        assert str(joint_sample_fault(wrong, kinds, classes)).startswith(says)
