"""The joint demo data: all labels of a scene agree, and no larger product is hidden by a smaller one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from allinone_ds.data.demo import CLASSES, IGNORE, JointSizes, SceneLook, compose_scene, load_pool, make_joint_demo_data
from allinone_ds.data.demo.joint import COLOURS, DEPTH_SCALE, depth_map, points_of

CROWDED = SceneLook(size=64, objects=(3, 5), scale=(0.3, 0.6), overlap=0.6, nearest_last=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("joint")
    return make_joint_demo_data(root, seed=5, sizes=JointSizes(train=12, test=2), progress=False) / "train"


def pixels(split: Path, kind: str, index: int) -> np.ndarray:
    return np.asarray(Image.open(split / kind / f"{index:06d}.png")).astype(int)


def test_masks_boxes_and_keypoints_are_those_of_the_label_map(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(split / "objects.json"))
    for index in range(12):
        label_map, covered = pixels(split, "label_maps", index), np.zeros((64, 64), bool)
        for annotation in coco.imgToAnns[index]:
            mask = coco.annToMask(annotation).astype(bool)
            assert not (covered & mask).any() and annotation["area"] == mask.sum()
            covered |= mask
            certain = mask & (label_map != IGNORE)
            assert set(label_map[certain]) <= {annotation["category_id"]}
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            points = np.reshape(annotation["keypoints"], (-1, 3))
            assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].all() and (points[:, 2] == 2).all()
            middle_row, middle_column = rows.mean() + 0.5, columns.mean() + 0.5
            assert points[0, 1] == points[2, 1] and abs(points[0, 1] - middle_row) <= 1
            assert points[1, 0] == points[3, 0] and abs(points[1, 0] - middle_column) <= 1
            assert points[0, 0] == columns[rows == int(points[0, 1])].min() + 0.5
            assert points[3, 1] == rows[columns == int(points[3, 0])].max() + 0.5
        saliency, edges = pixels(split, "saliency", index), pixels(split, "edges", index)
        assert (saliency[covered] > 0).all() and set(saliency[~covered]) <= {0, 128}
        assert set(np.unique(edges)) == {0, 255} and (edges > 0).sum() < covered.sum() + 200
        depth = pixels(split, "depth", index)
        assert ((depth == 0) == (~covered | (label_map == IGNORE))).all()


@pytest.mark.parametrize("shape", ["square", "two legs", "ring"])
def test_points_of_a_mirrored_product_are_its_mirrored_points(shape: str) -> None:
    """As training assumes when it mirrors images: straight sides and legs leave no choice."""
    inside = np.zeros((21, 21), bool)
    inside[4:17, 3:16] = True
    inside[8:, 8:11] &= shape == "square"
    inside[12:, 8:11] |= shape == "ring"
    (left, top, right, bottom), mirrored = points_of(*np.nonzero(inside)), points_of(*np.nonzero(inside[:, ::-1]))
    expected = [(21 - x, y) for x, y in (right, top, left, bottom)]
    assert np.abs(np.subtract(mirrored, expected)).max() <= 1, (mirrored, expected)


def test_the_table_has_what_is_in_each_image(split: Path) -> None:
    coco = json.loads((split / "objects.json").read_text())
    with (split / "table.csv").open() as file:
        for index, row in enumerate(csv.DictReader(file)):
            present = {a["category_id"] - 1 for a in coco["annotations"] if a["image_id"] == index}
            assert [k for k, name in enumerate(CLASSES) if row[name] == "1"] == sorted(present)
            assert int(row["count"]) == sum(a["image_id"] == index for a in coco["annotations"])
            assert {row[colour] for colour in COLOURS} <= {"0", "1", ""}


def test_the_nearest_product_is_in_front() -> None:
    """Of two products that overlap, the larger one is pasted later and has the smaller depth."""
    hidden = 0
    for seed in range(20):
        scene = compose_scene(np.random.default_rng(seed), load_pool("train"), CROWDED)
        assert (np.diff(scene.sides) >= 0).all()
        depth = depth_map(scene) * DEPTH_SCALE
        for number, side in zip(np.unique(scene.instances)[1:], scene.sides, strict=True):
            inside = (scene.instances == number) & (scene.label_map != IGNORE)
            assert np.allclose(depth[inside], 1 / side, atol=1e-3)
        hidden += len(scene.sides) > 1
    assert hidden > 10


def test_folders_that_are_not_demo_data_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(FileExistsError, match=r"train exists .* different folder"):
        make_joint_demo_data(tmp_path, sizes=JointSizes(train=1, test=1), progress=False)
