"""`check_sources` reports every fault of every source and never stops at the first."""

from pathlib import Path

import pytest
import torch
from torchvision import tv_tensors

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.check import check_sources
from allinone_ds.data.dense_maps import DenseMap
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from tests.data.tiny_sets import COCO, COUNT, FOLDERS, errors, source, write_images


def test_the_check_continues_after_a_source_that_cannot_be_opened(coco_root):
    (coco_root / "images" / "6.png").write_bytes(b"no image")
    sources = {"first": source({**COCO, "annotations": "no.json"}), "second": source(COCO)}
    found = check_sources(sources, coco_root, progress=False)
    assert [Path(p.file).name for p in found] == ["first", "6.png"]


def test_the_check_compares_the_classes_of_train_and_test(folders_root):
    write_images(folders_root / "test" / "cat", 1)
    sources = {"train": source(FOLDERS), "test": source({**FOLDERS, "images": "test"})}
    assert [p for p in check_sources(sources, folders_root, progress=False) if p.level == "error"] == []
    [found] = [
        p
        for p in check_sources(sources, folders_root, progress=False, classes_of={"test": "train"})
        if p.level == "error"
    ]
    assert found.file == "test" and "class 'cat' is not in the train set" in found.reason


def test_a_missing_file_is_reported_once(coco_root):
    (coco_root / "images" / "6.png").unlink()
    assert len(errors(COCO, coco_root)) == 1


def test_the_progress_bar_is_drawn_on_stderr(coco_root, capsys):
    check_sources({"my boxes": source(COCO)}, coco_root, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "my boxes" in err and f"{COUNT}/{COUNT}" in err


class Failing(SampleDataset):
    """A custom dataset that raises an error of its own for sample 1."""

    kind, classes = "depth", []

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise KeyError("depth")
        image = tv_tensors.Image(torch.zeros(3, 4, 4, dtype=torch.uint8))
        depth = DenseMap(torch.arange(1.0, 17.0).view(4, 4) + index)
        return {"image": image, "depth": depth, "path": self.path(index), "index": index}


@pytest.mark.parametrize(
    ("dataset", "reasons"),
    [
        (Failing(), ["dataset#1: raised KeyError: 'depth'"]),
        (ClassifiedDataset("cats", Path(), [], [], ["cat"]), ["cats: contains no sample; provide at least one"]),
    ],
)
def test_datasets_are_checked_like_sources(dataset, reasons):
    assert [str(p) for p in check_sources({"it": dataset}, progress=False)] == reasons


def test_images_of_the_test_set_in_the_same_folder_are_used(tmp_path):
    names = write_images(tmp_path / "images")
    for part, chosen in (("train", names[:4]), ("test", names[4:6])):
        (tmp_path / f"{part}.txt").write_text("".join(f"{name} {i % 2}\n" for i, name in enumerate(chosen)))
    lists = {
        part: source({"format": "image_list", "images": "images", "list": f"{part}.txt"}) for part in ("train", "test")
    }

    def unused(parts):
        problems = check_sources(parts, tmp_path, progress=False, classes_of={"test": "train"})
        return [p.reason for p in problems if "not used" in p.reason and "images" in p.file]

    assert unused(lists) == ["images in no annotation, not used: 1 (6.png)"]
    assert unused({"train": lists["train"]}) == ["images in no annotation, not used: 3 (4.png, 5.png, 6.png)"]
    (tmp_path / "images" / "6.png").unlink()
    assert unused(lists) == []
