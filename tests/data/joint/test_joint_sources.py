"""Images of a joint group are paired with the labels of each task; what does not fit is said in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from allinone_ds.data import JointDataset, stack_pixels, train_transform
from allinone_ds.data.base import Sample
from allinone_ds.data.check import check_sources
from allinone_ds.data.formats.own import OwnSource
from allinone_ds.data.joint.batches import JointCollate, views_of
from allinone_ds.data.joint.dataset import TaskView, view_of
from allinone_ds.data.joint.sources import GroupSource, PairedSource
from allinone_ds.data.sources import open_source
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.tasks import TASKS
from tests.joint_set import CLASSES, LABELLED, joint_source, make_joint_set

KINDS = {"seg": "segmentation", "det": "detection", "cls": "classification"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_joint_set(tmp_path)
    return tmp_path


def group(source: dict[str, Any] | list[dict[str, Any]], **more: Any) -> GroupSource:
    sources = [PairedSource(**s) for s in (source if isinstance(source, list) else [source])]
    return GroupSource(group="rooms", tasks=list(KINDS), sources=sources, classes={"seg": CLASSES["seg"]}, **more)


def opened(root: Path, source: Any = None, **more: Any) -> Any:
    return open_source(group(source or joint_source(), **more), root)


def test_each_task_sees_its_labels_of_the_images_that_have_some(root: Path) -> None:
    dataset = opened(root)
    assert len(dataset) == 12 and dataset.kinds == KINDS and dataset.classes_of == CLASSES
    sample = dataset[11]
    assert list(sample["targets"]) == ["seg"] and dataset[9]["targets"]["cls"] == {"label": 0}
    for task, count in LABELLED.items():
        view = TaskView(dataset, task)
        assert (len(view), view.kind, view.classes) == (count, KINDS[task], CLASSES[task])
        for index in (0, count - 1):
            mine, whole = view[index], view_of(dataset[index], task)
            assert mine.keys() == whole.keys() and Path(mine["path"]).name == f"{index:03}.png"
            assert torch.equal(mine["image"], whole["image"])
        assert set(view.annotation(1)) & {"mask", "boxes", "label"}
        assert view.in_memory == (task != "seg")  # so that counting classes decodes no image


def test_an_image_is_decoded_once_for_all_tasks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from allinone_ds.data import images

    read: Counter[str] = Counter()
    decode = images._read_image
    monkeypatch.setattr(images, "_read_image", lambda path, data: read.update([path]) or decode(path, data))
    dataset = opened(root)
    sample = dataset[1]
    assert set(sample["targets"]) == set(KINDS) and list(read.values()) == [1]
    dataset.check(1)
    assert list(read.values()) == [2]


class Bare(JointDataset):
    """Images of which none has a label of "cls"."""

    kinds = {"seg": "segmentation", "cls": "classification"}
    classes_of = {"seg": ["sky", "ground"], "cls": ["day", "night"]}

    def __init__(self, root: Path) -> None:
        self.name = "bare"

    def __len__(self) -> int:
        return 4

    def rows(self, task: str) -> list[int]:
        return [] if task == "cls" else [0, 1, 2, 3]

    def __getitem__(self, index: int) -> Sample:
        image = tv_tensors.Image(torch.full((3, 8, 8), 60 * index, dtype=torch.uint8))
        targets = {"seg": {"mask": tv_tensors.Mask(torch.full((8, 8), index // 2, dtype=torch.uint8))}}
        return {"image": image, "path": f"{index}.png", "index": index, "targets": targets}


def test_a_task_without_any_label_is_refused(root: Path) -> None:
    own = OwnSource(format="class", dataset="tests.data.joint.test_joint_sources:Bare")
    rooms = {"group": "rooms", "sources": [own]}
    said = "task 'cls': none of the 4 images has a label of it, so it has nothing to learn from; add labels, or take"
    with pytest.raises(DataError, match=said):
        open_source(GroupSource(tasks=["seg", "cls"], **rooms), root)
    [problem] = [p for p in check_sources({"rooms train": GroupSource(tasks=["seg", "cls"], **rooms)}, root, False)
                 if p.level == "error"]  # fmt: skip
    assert said in problem.reason
    assert open_source(GroupSource(tasks=["seg"], **rooms), root).structural == []
    [warning] = open_source(GroupSource(tasks=["seg", "cls"], part="test", **rooms), root).structural
    assert warning.level == "warning" and "so its metrics say nothing" in warning.reason


def test_a_split_that_leaves_a_part_without_labels_is_said(root: Path) -> None:
    content = json.loads((root / "train" / "boxes.json").read_text())
    content["images"] = content["images"][1:2]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] == 1]
    (root / "train" / "boxes.json").write_text(json.dumps(content))
    found = [
        problem
        for part in ("train", "test")
        for problem in open_source(group(joint_source(), split={"test": 0.5}, part=part), root, strict=False).structural
        if "task 'det': none of the" in problem.reason
    ]
    assert len(found) == 1 and found[0].level in ("error", "warning")


def test_missing_labels_are_refused_unless_they_are_meant(root: Path) -> None:
    with pytest.raises(DataError) as failed:
        opened(root, joint_source(partial=False))
    text = str(failed.value)
    assert "task 'det': 5 of the 12 images of the joint group have no label of it (first: 007)" in text
    assert "task 'cls': 2 of the 12" in text and "partial: true" in text and "'seg'" not in text
    warnings = [str(problem) for problem in opened(root).structural]
    assert any("task 'det': 7 of 12 images have a label of it" in warning for warning in warnings)
    (root / "train" / "maps" / "003.png").unlink()
    with pytest.raises(DataError, match=r"003.png: has no label map"):
        opened(root, joint_source(partial=False))
    assert len(TaskView(opened(root), "seg")) == 11
    for folder in ("images", "maps"):
        Image.new("RGB" if folder == "images" else "L", (64, 48)).save(root / "train" / folder / "new.png")
    (root / "train" / "maps" / "new.png").unlink()
    warnings = [str(problem) for problem in opened(root).structural]
    assert any("1 of 13 images have no label of any task and are not used" in warning for warning in warnings)


def test_labels_of_other_images_are_refused(root: Path) -> None:
    source = joint_source()
    shutil.copytree(root / "train" / "images", root / "other")
    (root / "other" / "000.png").rename(root / "other" / "x.png")
    maps = root / "train" / "maps"
    (maps / "000.png").rename(maps / "x.png")
    source["labels"]["seg"]["images"] = "other"
    with pytest.raises(DataError, match=r"task 'seg': 1 of its 12 images are not among the 12 of the joint group \(f"):
        opened(root, source)


def test_two_labels_of_one_image_are_refused(root: Path) -> None:
    listed = root / "train" / "list.txt"
    listed.write_text(listed.read_text() + "000.png 1\n")
    with pytest.raises(DataError, match=r"task 'cls': 1 of its images have more than one label \(first: .*000.png"):
        opened(root)


def test_images_of_two_sizes_are_one_clear_fault(root: Path) -> None:
    source = joint_source()
    shutil.copytree(root / "train" / "images", root / "large")
    for file in (root / "large").iterdir():
        Image.open(file).resize((128, 96)).save(file)
    large = {"format": "coco", "images": "large", "annotations": "large.json"}
    content = json.loads((root / "train" / "boxes.json").read_text())
    for image in content["images"]:
        image |= {"width": 128, "height": 96}
    (root / "large.json").write_text(json.dumps(content))
    source["labels"]["det"] = large
    dataset = opened(root, source)
    with pytest.raises(BrokenSample, match=r"that 'det' labels is 128 x 96 .* image .*train/images/000.png is 64 x 48"):
        dataset[0]
    problems = check_sources({"rooms train": dataset}, root, progress=False)
    assert sum("labels is 128 x 96" in str(problem) for problem in problems) == LABELLED["det"]


def test_sources_without_a_common_folder_are_paired_by_name(root: Path) -> None:
    source = joint_source(images=None)
    for label in source["labels"].values():
        label["images"] = "train/images"
    shutil.copytree(root / "train" / "images", root / "copy")
    source["labels"]["det"]["images"] = "copy"
    dataset = opened(root, source)
    assert len(dataset) == 12 and list(dataset[0]["targets"]) == list(KINDS)


def test_several_sources_and_a_split_divide_images_and_not_labels(root: Path) -> None:
    both = [joint_source(), joint_source("test", weight=2)]
    dataset = opened(root, both)
    assert len(dataset) == 17 and [part.per_epoch for part in dataset.draw_parts] == [12, 10]
    assert len(TaskView(dataset, "det")) == 7 + 5 and dataset[12]["path"].endswith("test/images/000.png")
    parts = [opened(root, split={"test": 0.25}, part=part) for part in ("train", "test")]
    paths = [{part.path(index) for index in range(len(part))} for part in parts]
    assert [len(p) for p in paths] == [9, 3] and not paths[0] & paths[1]
    for part, own in zip(parts, paths, strict=True):
        for task in KINDS:
            view = TaskView(part, task)
            assert {view.path(index) for index in range(len(view))} <= own


def test_all_targets_move_with_the_pixels(root: Path) -> None:
    dataset = opened(root)
    sample = dataset[1]
    transform = train_transform([{"RandomHorizontalFlip": {"p": 1.0}}], (48, 64), "joint")
    moved = transform(sample)
    assert torch.equal(moved["image"], sample["image"].flip(-1))
    assert torch.equal(moved["targets"]["seg"]["mask"], sample["targets"]["seg"]["mask"].flip(-1))
    x0, y0, x1, y1 = sample["targets"]["det"]["boxes"][0].tolist()
    assert moved["targets"]["det"]["boxes"][0].tolist() == [64 - x1, y0, 64 - x0, y1]
    assert moved["targets"]["cls"] == {"label": 1}
    gone = train_transform([{"CenterCrop": {"size": [8, 8]}}], (8, 8), "joint")(sample)["targets"]["det"]
    assert len(gone["boxes"]) == len(gone["labels"]) == len(gone["iscrowd"])


def test_a_batch_has_the_rows_of_each_task(root: Path) -> None:
    classes = {task: TASKS[kind] for task, kind in KINDS.items()}
    collate = JointCollate({t: c.collate for t, c in classes.items()}, {t: c.unlabelled for t, c in classes.items()})
    dataset = opened(root)
    samples = [train_transform([], (32, 32), "joint")(dataset[index]) for index in (0, 8, 11)]
    batch = collate(samples)
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert {task: None if rows is None else rows.tolist() for task, rows in batch["rows"].items()} == {
        "seg": None,
        "det": [0],
        "cls": [0, 1],
    }
    assert batch["labels"]["cls"].tolist() == [0, 2] and batch["labelled"] == {"seg": 3, "det": 1, "cls": 2}
    assert views_of(samples, "cls")[0] == [0, 1]
    bare = collate(samples[2:])
    assert bare["labelled"] == {"seg": 1, "det": 0, "cls": 0} and bare["rows"]["det"].tolist() == [0]
    assert len(bare["labels"]["det"][0]["boxes"]) == 0


def test_a_batch_stacks_its_images_once(root: Path) -> None:
    """Also where labels are made of the pixels, and once per set of images where tasks lack labels of some."""
    pixels: dict[str, torch.Tensor] = {}

    def collate_of(task: str) -> Any:
        def collate(samples: list[Sample]) -> dict[str, Any]:
            batch = TASKS[KINDS[task]].collate(samples)
            pixels[task] = batch["pixel_values"]
            return {**batch, "labels": (batch["labels"], stack_pixels(samples))}

        return collate

    collate = JointCollate({t: collate_of(t) for t in KINDS}, {t: TASKS[k].unlabelled for t, k in KINDS.items()})
    dataset = opened(root)
    samples = [train_transform([], (32, 32), "joint")(dataset[index]) for index in (0, 8, 11)]
    for chosen in (samples, samples[:1]):
        batch = collate(chosen)
        for task, rows in batch["rows"].items():
            assert torch.equal(pixels[task], batch["pixel_values"] if rows is None else batch["pixel_values"][rows])
            assert batch["labels"][task][1] is pixels[task]
            assert (rows is None) == (pixels[task] is batch["pixel_values"])
    assert set(map(id, pixels.values())) == {id(batch["pixel_values"])}
    assert stack_pixels(samples) is not stack_pixels(samples)


class Rooms(JointDataset):
    """A dataset of one's own with labels of two tasks."""

    kinds = {"seg": "segmentation", "cls": "classification"}
    classes_of = {"seg": ["sky", "ground"], "cls": ["day", "night"]}

    def __init__(self, root: Path, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = tv_tensors.Image(torch.full((3, 8, 8), 10 * index, dtype=torch.uint8))
        mask = tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.uint8))
        targets = {"seg": {"mask": mask}, "cls": {"label": index % 2}}
        return {"image": image, "path": self.path(index), "index": index, "targets": targets}


def test_a_class_of_ones_own_gives_the_samples_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from allinone_ds.data import OwnSource

    monkeypatch.setitem(sys.modules, "rooms", sys.modules[__name__])

    def own(tasks: list[str], **keys: Any) -> GroupSource:
        return GroupSource(group="g", tasks=tasks, sources=[OwnSource(format="class", dataset="rooms:Rooms", **keys)])

    dataset = open_source(own(["seg", "cls"], options={"count": 5}), tmp_path)
    assert len(dataset) == 5 and TaskView(dataset, "cls")[1]["label"] == 1
    with pytest.raises(DataError, match=r"kinds has cls, seg, the tasks of joint.g are seg, depth"):
        open_source(own(["seg", "depth"]), tmp_path)
    with pytest.raises(DataError, match=r"its __init__ takes root"):
        open_source(own(["seg", "cls"], options={"size": 5}), tmp_path)
    with pytest.raises(DataError, match=r"classes_of\['cls'\] is \['day', 'night'\], those of the task .* \['night'"):
        open_source(own(["seg", "cls"]), tmp_path, {"seg": ["sky", "ground"], "cls": ["night", "day"]})


def test_columns_of_a_datasets_folder_are_labels_of_one_image(tmp_path: Path) -> None:
    import datasets

    def picture(mode: str, value: int) -> Image.Image:
        return Image.new(mode, (8, 6), value if mode == "L" else (value,) * 3)

    rows = {
        "photo": [picture("RGB", 40 * n) for n in range(3)],
        "regions": [picture("L", n % 2) for n in range(3)],
        "time": [0, 1, 0],
    }
    image, names = datasets.Image(), datasets.ClassLabel(names=["day", "night"])
    features = datasets.Features({"photo": image, "regions": image, "time": names})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "rooms"))
    shared = {"format": "datasets", "path": "rooms"}
    seg = {"kind": "segmentation", "columns": {"image": "photo", "label_map": "regions"}, "classes": ["sky", "ground"]}
    cls = {"kind": "classification", "columns": {"image": "photo", "label": "time"}}
    source = PairedSource(format="joint", labels={"seg": {**shared, **seg}, "cls": {**shared, **cls}})
    dataset = open_source(GroupSource(group="g", tasks=["seg", "cls"], sources=[source]), tmp_path)
    assert len(dataset) == 3 and dataset.classes_of == {"seg": ["sky", "ground"], "cls": ["day", "night"]}
    sample = dataset[1]
    assert sample["targets"]["cls"]["label"] == 1 and bool((sample["targets"]["seg"]["mask"] == 1).all())


def test_a_list_names_the_images_that_are_used(root: Path) -> None:
    (root / "some.txt").write_text("000\n003.png\n011\n")
    source = joint_source(image_list="some.txt")
    dataset = opened(root, source)
    assert [Path(dataset.path(index)).stem for index in range(3)] == ["000", "003", "011"] and len(dataset) == 3
    (root / "train" / "maps" / "001.png").unlink()  # of no listed image
    assert len(opened(root, {**source, "partial": True})) == 3
    (root / "some.txt").write_text("000\n999\n")
    with pytest.raises(DataError, match=r"images/999: is listed in .*some.txt, but missing; add the image"):
        opened(root, source)


def test_lists_of_other_forms(root: Path) -> None:
    for folder in ("images", "maps"):
        (root / "train" / folder / "003.png").rename(root / "train" / folder / "a b.png")
    for file in ("boxes.json", "list.txt"):
        text = (root / "train" / file).read_text()
        (root / "train" / file).write_text(text.replace("003.png", "a b.png"))
    source = joint_source(image_list="some.txt")
    for text in ("000\r\na b\r\n011.png\r\n", "000  1\na b\n011 -1\n"):  # the second as VOC's lists of one class
        (root / "some.txt").write_bytes(text.encode())
        names = [Path(opened(root, source).path(index)).stem for index in range(3)]
        assert names == ["000", "a b", "011"]
    (root / "some.txt").write_text("\n")
    with pytest.raises(DataError, match="some.txt: lists no image; write the name of one per line"):
        opened(root, source)


def test_a_task_without_any_label_is_an_error_also_where_labels_may_be_missing(root: Path) -> None:
    (root / "train" / "list.txt").write_text("999.png 0\n998.png 1\n")
    with pytest.raises(DataError, match=r"task 'cls': none of the 12 images has a label of it; .* \(its source has"):
        opened(root)


def test_labels_in_voc_annotations_keep_their_own_folder(root: Path) -> None:
    (root / "train" / "images").rename(root / "train" / "JPEGImages")
    (root / "train" / "Annotations").mkdir()
    for number in range(12):
        box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>9</xmax><ymax>12</ymax></bndbox>"
        size = "<size><width>64</width><height>48</height></size>"
        text = (
            f"<annotation><filename>{number:03}.png</filename>{size}<object><name>red</name>{box}</object></annotation>"
        )
        (root / "train" / "Annotations" / f"{number:03}.xml").write_text(text)
    source = joint_source(images="train/JPEGImages")
    source["labels"]["det"] = {"format": "voc", "path": "train"}
    dataset = opened(root, source)
    assert dataset[4]["targets"]["det"]["boxes"].tolist() == [[2, 3, 9, 12]] and len(dataset.rows("det")) == 12


def test_a_map_of_another_size_than_its_image_is_one_clear_fault(root: Path) -> None:
    Image.new("L", (32, 24)).save(root / "train" / "maps" / "002.png")
    problems = check_sources({"rooms train": group(joint_source())}, root, progress=False)
    [fault] = [str(problem) for problem in problems if problem.level == "error"]
    assert "maps/002.png" in fault and "32 x 24" in fault and "64 x 48" in fault
