"""`open_source` and the type `Source`: what holds for every data format, and how a format is added."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torchvision import tv_tensors

from allinone_ds.data.base import SourceConfig
from allinone_ds.data.check import check_sources
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.sources import SOURCE_CLASSES, open_source, source_type
from allinone_ds.errors import DataError
from tests.data.tiny_sets import CLASSES, COCO, COUNT, FOLDERS, HEIGHT, LIST, MAPS, WIDTH, opened, source, write_images


@pytest.mark.parametrize(
    ("config", "fixture", "kind"),
    [
        (COCO, "coco_root", "detection"),
        (MAPS, "maps_root", "segmentation"),
        (LIST, "list_root", "classification"),
        (FOLDERS, "folders_root", "classification"),
    ],
)
def test_samples_have_the_documented_fields(config, fixture, kind, request):
    dataset = opened(config, request.getfixturevalue(fixture))
    assert dataset.kind == kind and dataset.classes == CLASSES
    assert len(dataset) == (6 if config is FOLDERS else COUNT)
    for i in range(len(dataset)):
        sample = dataset[i]
        assert type(sample["image"]) is tv_tensors.Image and sample["image"].dtype == torch.uint8
        assert sample["image"].shape == (3, HEIGHT, WIDTH)
        assert sample["index"] == i and sample["path"] == dataset.path(i) and Path(sample["path"]).is_file()
        stored = np.array(Image.open(sample["path"]))
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), stored)
    assert list(dataset.problems()) == [None] * len(dataset)
    assert check_sources({"it": dataset}, progress=False) == [] or config is FOLDERS  # equal files in two folders


def test_an_error_message_shows_the_first_ten_faults(list_root):
    (list_root / "list.txt").write_text("".join(f"missing{i}.png 0\n" for i in range(50)))
    with pytest.raises(
        DataError, match="(?s)50 problems.*missing0.*missing9.*40 more; `allinone-ds check CONFIG` lists all"
    ) as caught:
        opened(LIST, list_root)
    assert len(caught.value.problems) == 50 and str(caught.value).count("missing;") == 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**COCO, "format": "cocoo"}, "format is 'cocoo'; did you mean 'coco'"),
        ({k: v for k, v in COCO.items() if k != "format"}, "format is None"),
        ({**COCO, "annotation": "x"}, "annotation"),
        ({k: v for k, v in COCO.items() if k != "images"}, "images"),
    ],
)
def test_mistakes_in_a_source_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        source(config)


def test_only_a_source_can_be_opened(coco_root):
    with pytest.raises(TypeError, match=r"source is a dict; give an instance of a source class \(.*CocoSource"):
        open_source(COCO, coco_root)


# ---- a new format: one class, and one line that registers it


class OneClassSource(SourceConfig):
    """All images of a folder are of one class, named after the folder."""

    format: Literal["one_class"]
    images: str

    def open(self, root, classes=None):
        folder = root / self.images
        files = sorted(file.name for file in folder.iterdir())
        return ClassifiedDataset(str(folder), folder, files, [0] * len(files), [folder.name])


Extended = TypeAdapter(source_type((*SOURCE_CLASSES, OneClassSource)))


def test_a_new_format_is_opened_and_checked(tmp_path):
    write_images(tmp_path / "cat")
    (tmp_path / "cat" / "3.png").write_bytes(b"no image")
    (tmp_path / "dog").mkdir()
    cats = Extended.validate_python({"format": "one_class", "images": "cat", "expect": {"samples": COUNT + 1}})
    dogs = Extended.validate_python({"format": "one_class", "images": "dog"})
    found = check_sources({"cats": cats, "dogs": dogs}, tmp_path, progress=False)
    assert [Path(p.file).name for p in found] == ["cat", "cat", "3.png", "dog"]
    assert [p.reason.split(";")[0] for p in found] == [
        "holds 7 samples, expect.samples is 8: 1 missing",
        "only class 'cat' occurs, so there is nothing to tell apart",
        "is not an image, or its header is damaged",
        "contains no sample",
    ]
    dataset = open_source(cats, tmp_path, strict=False)
    assert dataset.classes == ["cat"] and dataset[0]["image"].shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match="dog: 1 problem in the data\n.*contains no sample"):
        open_source(dogs, tmp_path)


def test_a_misspelt_new_format_is_refused_with_the_nearest_name():
    with pytest.raises(ValidationError, match="format is 'one_clas'; did you mean 'one_class'"):
        Extended.validate_python({"format": "one_clas", "images": "cat"})
    with pytest.raises(ValidationError, match=r"one_class\.image\n.*not permitted"):
        Extended.validate_python({"format": "one_class", "images": "cat", "image": "x"})
    assert isinstance(Extended.validate_python(COCO), SourceConfig)  # the formats of the package remain available


NOT_PATHS = {
    *("format", "kind", "bbox_format", "name", "split", "label_map_suffix", "map_suffix", "image_suffix"),
    *("image_column", "label_column", "delimiter", "columns", "box_columns", "label_columns", "part", "flip_pairs"),
    *("dataset", "reason", "options"),
}
"""Fields of text that name no file or folder."""


def text_fields() -> list[tuple[type[SourceConfig], str]]:
    def accepts_text(annotation) -> bool:
        return annotation is str or any(map(accepts_text, get_args(annotation)))

    return [
        (source_class, name)
        for source_class in SOURCE_CLASSES
        for name, field in source_class.model_fields.items()
        if name not in NOT_PATHS and accepts_text(field.annotation)
    ]


@pytest.mark.parametrize(("source_class", "name"), text_fields(), ids=str)
def test_every_path_of_a_format_is_expanded(source_class, name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    field = source_class.model_fields[name]
    adapter = TypeAdapter(Annotated[field.annotation, name, *field.metadata])
    assert adapter.validate_python("~/x") == "/home/me/x"


def test_every_format_of_the_package_is_registered():
    folder = Path(__file__).parents[2] / "allinone_ds" / "data" / "formats"
    files = {file.stem for file in folder.rglob("*.py") if "\n    format: Literal[" in file.read_text()}
    assert {source_class.__module__.rpartition(".")[2] for source_class in SOURCE_CLASSES} == files


@pytest.mark.parametrize(
    "given",
    [
        {"format": "image_table", "images": ".", "table": "t.csv", "label_columns": ["a", "b"]},
        {"format": "label_maps", "images": ".", "label_maps": "m", "class_colors": ["#000000", [1, 2, 3]]},
        {"format": "label_maps", "images": ".", "label_maps": "m", "class_ids": [0, 255]},
        {"format": "box_table", "images": ".", "table": "t.csv", "label_column": None, "box_columns": ["bbox"]},
        {"format": "yolo", "images": "images/train"},
        {"format": "yolo", "data": "data.yaml", "split": "val"},
        {"format": "voc", "path": "VOC2012", "kind": "segmentation", "split": "val"},
        {"format": "datasets", "path": "x", "kind": "segmentation", "class_ids": [0, 5]},
    ],
)
def test_what_a_run_writes_of_a_source_is_read_again(given):
    """config.yaml of a run holds the defaults too."""
    first = source(given)
    assert source(first.model_dump(mode="json")) == first
