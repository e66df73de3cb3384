import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from tiny_sets import CLASSES, HEIGHT, WIDTH, pixels

from allinone_ds.data.check import check_sources
from allinone_ds.data.formats.hugging_face import DatasetsSource, HubDataset
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import BrokenSample, DataError

datasets = pytest.importorskip("datasets")

COUNT = 4
PICTURES = [Image.fromarray(pixels(i)) for i in range(COUNT)]
BOXES = [[[1.0, 2.0, 10.0, 5.0]], [], [[0.0, 0.0, 4.0, 4.0], [5.0, 5.0, 6.0, 7.0]], [[3.0, 3.0, 3.0, 3.0]]]
KINDS = [[0], [], [1, 2], [2]]


def opened(root, kind, **options):
    config = {"format": "datasets", "path": "set", "kind": kind, **options}
    classes = options.pop("train_classes", None)
    config.pop("train_classes", None)
    return open_source(TypeAdapter(Source).validate_python(config), root, classes=classes)


def save(root, features, rows, as_dict=False):
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (datasets.DatasetDict({"train": table, "test": table}) if as_dict else table).save_to_disk(str(root / "set"))


def save_boxes(root, boxes=BOXES, layout="dict", categories=KINDS):
    label = datasets.ClassLabel(names=CLASSES)
    if layout == "dict":
        objects = {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(label),
        }
        rows = [{"bbox": b, "category": c} for b, c in zip(boxes, categories, strict=True)]
    else:
        objects = datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": label})
        rows = [
            [{"bbox": x, "category": y} for x, y in zip(b, c, strict=True)]
            for b, c in zip(boxes, categories, strict=True)
        ]
    save(root, {"image": datasets.Image(), "objects": objects}, {"image": PICTURES, "objects": rows})


@pytest.mark.parametrize("as_dict", [False, True])
def test_classification(tmp_path, as_dict):
    features = {"photo": datasets.Image(), "what": datasets.ClassLabel(names=CLASSES)}
    save(tmp_path, features, {"photo": PICTURES, "what": [0, 1, 2, 1]}, as_dict)
    dataset = opened(tmp_path, "classification", columns={"image": "photo", "label": "what"}, split="train")
    assert (dataset.kind, dataset.classes, len(dataset)) == ("classification", CLASSES, COUNT)
    assert [dataset[i]["label"] for i in range(COUNT)] == [0, 1, 2, 1]
    for i in range(COUNT):
        assert np.array_equal(dataset[i]["image"].permute(1, 2, 0).numpy(), pixels(i))
        assert dataset[i]["index"] == i and dataset[i]["path"] == f"set[train]#{i}"
    assert check_sources({"it": dataset}, progress=False) == []
    wanted = [CLASSES[::-1].index(CLASSES[i]) for i in (0, 1, 2, 1)]
    reordered = opened(
        tmp_path, "classification", columns={"image": "photo", "label": "what"}, train_classes=CLASSES[::-1]
    )
    assert [reordered[i]["label"] for i in range(COUNT)] == wanted


def test_class_names_in_a_text_column(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Value("string")}
    save(tmp_path, features, {"image": PICTURES, "label": ["cow", "ant", "cow", "bee"]})
    dataset = opened(tmp_path, "classification")
    assert dataset.classes == CLASSES and [dataset[i]["label"] for i in range(COUNT)] == [2, 0, 2, 1]


@pytest.mark.parametrize("layout", ["dict", "list"])
@pytest.mark.parametrize("bbox_format", ["coco", "pascal"])
def test_detection(tmp_path, layout, bbox_format):
    stored = [[[x, y, x + w, y + h] for x, y, w, h in b] for b in BOXES] if bbox_format == "pascal" else BOXES
    save_boxes(tmp_path, stored, layout)
    dataset = opened(tmp_path, "detection", bbox_format=bbox_format)
    assert dataset.classes == CLASSES
    for i in range(COUNT):
        sample = dataset[i]
        assert sample["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in BOXES[i]]
        assert sample["boxes"].shape == (len(BOXES[i]), 4) and sample["boxes"].canvas_size == (HEIGHT, WIDTH)
        assert sample["labels"].tolist() == KINDS[i] and sample["labels"].dtype == torch.long
        assert sample["iscrowd"].tolist() == [False] * len(BOXES[i])


def test_the_wrong_bbox_format_is_noticed(tmp_path):
    save_boxes(tmp_path, [[[20.0, 10.0, 30.0, 20.0]]] * COUNT, categories=[[0]] * COUNT)
    with pytest.raises(BrokenSample, match="outside its image of 32 x 24.*or set bbox_format .now coco"):
        opened(tmp_path, "detection")[0]
    assert len(check_sources({"it": opened(tmp_path, "detection")}, progress=False)) == COUNT
    assert len(opened(tmp_path, "detection", bbox_format="pascal")[0]["boxes"]) == 1


def test_segmentation(tmp_path):
    maps = [np.random.default_rng(i).choice([0, 1, 2, 255], (HEIGHT, WIDTH)).astype(np.uint8) for i in range(COUNT)]
    maps[3] = maps[3][:-1]
    features = {"image": datasets.Image(), "annotation": datasets.Image()}
    save(tmp_path, features, {"image": PICTURES, "annotation": [Image.fromarray(m) for m in maps]})
    dataset = opened(tmp_path, "segmentation", columns={"label_map": "annotation"}, classes=CLASSES)
    assert all(np.array_equal(dataset[i]["mask"].numpy(), maps[i]) for i in range(3))
    with pytest.raises(BrokenSample, match="is 32 x 23"):
        dataset[3]
    shifted = [Image.fromarray((m + 1).astype(np.uint8)) for m in maps]  # as in ADE20K: 0 for no class
    save(tmp_path, features, {"image": PICTURES, "annotation": shifted})
    from_one = {"ignore_index": 0, "first_id": 1}
    dataset = opened(tmp_path, "segmentation", columns={"label_map": "annotation"}, classes=CLASSES, **from_one)
    assert all(np.array_equal(dataset[i]["mask"].numpy(), maps[i]) for i in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"image": "img"}}, r"columns\.image = 'img'.*allowed: image, label"),
        ({"columns": {"image": "label", "label": "image"}}, "it must be an Image"),
        ({"path": "sett"}, "cannot be loaded"),
        ({"classes": ["only one"]}, "class 1 is not one of the 1 classes"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    save(
        tmp_path,
        {"image": datasets.Image(), "label": datasets.Value("int64")},
        {"image": PICTURES, "label": [0, 1, 0, 1]},
    )
    with pytest.raises(DataError, match=message):
        opened(tmp_path, "classification", **{"classes": ["x", "y"], **options})


def test_a_missing_split_names_those_there_are(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    save(tmp_path, features, {"image": PICTURES, "label": [0] * COUNT}, as_dict=True)
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'.*allowed: test, train"):
        opened(tmp_path, "classification", split="trian")


def test_broken_pictures_are_found(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    cells = [
        {"bytes": b"no picture", "path": None},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        None,
    ]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2]}, features=features)
    source = DatasetsSource(format="datasets", path="set", kind="classification")
    found = check_sources({"it": HubDataset(table, source, tmp_path)}, progress=False)
    assert [p.file for p in found] == ["set[train]#0", "set[train]#1", "set[train]#2"]
    reasons = ["not a picture", "gone.png: cannot be opened", "has no picture"]
    assert all(wanted in p.reason for wanted, p in zip(reasons, found, strict=True))
