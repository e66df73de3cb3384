"""DatasetsSource with attributes, numbers, identities, masks and keypoints in named columns."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from allinone_ds.data.inspection.targets import target_problems
from allinone_ds.errors import BrokenSample, ConfigError, DataError
from tests.data.formats.test_hugging_face import BOXES, COUNT, IMAGES, KINDS, opened, save
from tests.data.tiny_sets import CLASSES, HEIGHT, WIDTH

datasets = pytest.importorskip("datasets")

SIZE = (HEIGHT, WIDTH)
IMAGE = {"image": datasets.Image()}


def test_attributes_are_the_columns_of_numbers_or_those_named(tmp_path):
    types = {"hat": "bool", "old": "int64", "name": "string"}
    features = {**IMAGE, **{name: datasets.Value(dtype) for name, dtype in types.items()}}
    rows = {"image": IMAGES, "hat": [True, False, None, True], "old": [1, 0, 1, -1], "name": list("abcd")}
    save(tmp_path, features, rows)
    dataset = opened(tmp_path, "attributes")
    assert dataset.classes == ["hat", "old"] and dataset.kind == "attributes"
    values = torch.stack([dataset[i]["attributes"] for i in range(COUNT)])
    expected = torch.tensor([[1, 1], [0, 0], [math.nan, 1], [1, math.nan]])
    torch.testing.assert_close(values, expected, equal_nan=True)
    assert opened(tmp_path, "attributes", columns={"attributes": ["old"]}).classes == ["old"]
    assert torch.equal(dataset.annotation(0)["attributes"], dataset[0]["attributes"]) and dataset.encoded(0)
    with pytest.raises(DataError, match="columns.attributes: 'hta' is not a column; did you mean 'hat'"):
        opened(tmp_path, "attributes", columns={"attributes": ["hta"]})
    with pytest.raises(DataError, match="row 0: column 'name' is 'a'; allowed are 1"):
        opened(tmp_path, "attributes", columns={"attributes": ["name"]})
    with pytest.raises((ConfigError, ValueError), match="absent is an option of kind attributes"):
        opened(tmp_path, "regression", absent=-1)


def test_numbers_and_identities(tmp_path):
    features = {**IMAGE, "age": datasets.Value("float64"), "who": datasets.Value("string")}
    save(tmp_path, features, {"image": IMAGES, "age": [1.5e9 + 1, None, 3.0, 4.0], "who": ["eve", "ann", "eve", "bob"]})
    dataset = opened(tmp_path, "regression", columns={"values": ["age"]})
    assert dataset.classes == ["age"] and dataset[0]["value"].tolist() == [1.5e9 + 1] and dataset[1]["value"].isnan()
    found = opened(tmp_path, "retrieval", columns={"label": "who"}, train_classes=["bob", "zoe"])
    assert found.kind == "retrieval" and found.classes == ["bob", "zoe", "ann", "eve"]
    assert [found[i]["label"] for i in range(COUNT)] == found.labels == [3, 2, 3, 0]


def objects(part: str, feature, values):
    label = datasets.ClassLabel(names=CLASSES)
    inside = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}
    rows = [{"bbox": b, "category": c, part: v} for b, c, v in zip(BOXES, KINDS, values, strict=True)]
    return {**IMAGE, "objects": {**inside, part: datasets.List(feature)}}, {"image": IMAGES, "objects": rows}


def test_masks(tmp_path):
    polygon = datasets.List(datasets.List(datasets.Value("float64")))
    outlines = [[[[x, y, x + w, y, x + w, y + h, x, y + h]] for x, y, w, h in boxes] for boxes in BOXES]
    save(tmp_path, *objects("segmentation", polygon, outlines))
    dataset = opened(tmp_path, "instances")
    for index, boxes in enumerate(BOXES):
        masks = dataset[index]["masks"].numpy()
        for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
            expected = np.zeros(SIZE, dtype=np.uint8)
            expected[int(y) : int(y + h), int(x) : int(x + w)] = 1
            assert np.array_equal(mask, expected)
        assert masks.shape == (len(boxes), *SIZE)
    assert target_problems(dataset, SIZE) == []
    code = rle.encode(np.asfortranarray(np.ones(SIZE, dtype=np.uint8)))
    lengths = {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")}
    codes = [[{"size": list(SIZE), "counts": code["counts"].decode()} for _ in boxes] for boxes in BOXES]
    save(tmp_path / "more", *objects("segmentation", lengths, codes))
    assert opened(tmp_path / "more", "instances")[2]["masks"].sum() == 2 * HEIGHT * WIDTH
    save(tmp_path / "few", *objects("segmentation", polygon, [outlines[0], [], outlines[2][:1], outlines[3]]))
    with pytest.raises(BrokenSample, match="2 boxes and 1 segmentations"):
        opened(tmp_path / "few", "instances")[2]


def test_keypoints(tmp_path):
    numbers = datasets.List(datasets.Value("float64"))
    points = [[[x, y, 2, x + w, y + h, 0] for x, y, w, h in boxes] for boxes in BOXES]
    save(tmp_path, *objects("keypoints", numbers, points))
    dataset = opened(tmp_path, "keypoints", flip_pairs=[[0, 1]])
    sample = dataset[2]
    assert sample["keypoints"].shape == (2, 2, 2) and sample["visible"].tolist() == [[2, 0], [2, 0]]
    assert sample["mirrored"].tolist() == [[1, 0], [1, 0]] and sample["area"].tolist() == [16.0, 42.0]
    assert dataset[1]["keypoints"].shape[0] == 0 and target_problems(dataset, SIZE) == []
    save(tmp_path / "uneven", *objects("keypoints", numbers, [points[0], [], [[1, 2, 2], [3, 4, 2]], points[3]]))
    uneven = opened(tmp_path / "uneven", "keypoints")
    assert uneven[0]["visible"].shape == (1, 2)
    with pytest.raises(BrokenSample, match="keypoints has 1 points, the category has 2"):
        uneven[2]


def test_label_maps_of_colours_equal_those_of_ids(tmp_path):
    colors = np.array([[0, 0, 0], [0, 130, 200], [255, 0, 10], [9, 9, 9]], dtype=np.uint8)
    ids = [np.random.default_rng(i).integers(0, 4, SIZE) for i in range(COUNT)]
    save(tmp_path, {**IMAGE, "label": datasets.Image()},
         {"image": IMAGES, "label": [Image.fromarray(colors[i]) for i in ids]})  # fmt: skip
    coded = {"classes": CLASSES, "class_colors": ["#000000", [0, 130, 200], "#ff000a"], "ignore_colors": ["#090909"]}
    dataset = opened(tmp_path, "segmentation", **coded)
    for i in range(COUNT):
        assert np.array_equal(dataset[i]["mask"].numpy(), np.where(ids[i] == 3, 255, ids[i]))
    with pytest.raises(BrokenSample, match="is an image of mode RGB.*list them in class_colors"):
        opened(tmp_path, "segmentation", classes=CLASSES)[0]
    with pytest.raises(BrokenSample, match="1 colours .*: #090909"):
        opened(tmp_path, "segmentation", **{**coded, "ignore_colors": []})[0]
    with pytest.raises(DataError, match="class_colors has 3 colours for 2 classes"):
        opened(tmp_path, "segmentation", **{**coded, "classes": CLASSES[:2]})
    with pytest.raises((ConfigError, ValueError), match="class_colors is an option of kind segmentation"):
        opened(tmp_path, "depth", class_colors=["#000000"])
