"""Demo data: labels agree with the images, train and test are disjoint, and equal seeds give equal files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allinone_ds.data.demo import (
    CLASSES,
    IGNORE,
    DemoData,
    DemoSizes,
    SceneLook,
    compose_scene,
    load_pool,
    make_demo_data,
)

SMALL = DemoSizes(detection=(6, 4), segmentation=(6, 4), classification=(20, 10))
CROWDED = SceneLook(size=64, objects=(3, 5), scale=(0.3, 0.5), overlap=0.5)


def rng(*parts: int) -> np.random.Generator:
    return np.random.default_rng(list(parts))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return make_demo_data(tmp_path_factory.mktemp("demo"), seed=3, sizes=SMALL, progress=False)


def test_train_and_test_have_no_common_product_and_no_common_photo() -> None:
    train, test = load_pool("train"), load_pool("test")
    assert {tile.tobytes() for tile in train.tiles}.isdisjoint(tile.tobytes() for tile in test.tiles)
    assert {photo.tobytes() for photo in train.photos}.isdisjoint(photo.tobytes() for photo in test.photos)
    stems = [{name.split("-", 2)[2] for name in pool.photo_names} for pool in (train, test)]
    assert stems[0].isdisjoint(stems[1])
    assert min(map(len, stems)) >= 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_class_has_the_same_number_of_tiles(split: str) -> None:
    pool = load_pool(split)
    assert len(set(np.bincount(pool.labels, minlength=len(CLASSES)))) == 1
    assert ((pool.alphas > 0) >= (pool.tiles > 12)).all(), "filling holes removes no pixel of a product"
    assert (pool.alphas > 0).sum((1, 2)).min() > 10


def test_boxes_are_tight_around_the_visible_part_of_each_product() -> None:
    for i in range(50):
        scene = compose_scene(rng(i), load_pool("train"), CROWDED)
        seen = [number for number in np.unique(scene.instances) if number]
        assert len(seen) == len(scene.boxes) == len(scene.labels) > 0
        for number, box in zip(seen, scene.boxes, strict=True):
            ys, xs = np.nonzero(scene.instances == number)
            np.testing.assert_array_equal(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_the_label_map_agrees_with_the_instances() -> None:
    for i in range(50):
        scene = compose_scene(rng(i), load_pool("test"), CROWDED)
        seen = [number for number in np.unique(scene.instances) if number]
        truth = np.zeros_like(scene.label_map)
        for number, label in zip(seen, scene.labels, strict=True):
            truth[scene.instances == number] = label + 1
        certain = scene.label_map != IGNORE
        np.testing.assert_array_equal(scene.label_map[certain], truth[certain])
        assert set(np.unique(scene.label_map[certain])) == {0, *(scene.labels + 1)}


def test_pixels_outside_products_are_those_of_the_photo() -> None:
    look = SceneLook(size=64, objects=(1, 1))
    bare = compose_scene(rng(5), load_pool("train"), look.model_copy(update={"objects": (0, 0)}))
    scene = compose_scene(rng(5), load_pool("train"), look)
    assert not bare.label_map.any() and len(bare.boxes) == 0
    changed = (scene.image != bare.image).any(-1)
    assert changed.any() and not (changed & (scene.label_map == 0)).any()


def test_first_label_sets_the_class() -> None:
    look = SceneLook(size=48, objects=(1, 1))
    for label in range(len(CLASSES)):
        scene = compose_scene(rng(label), load_pool("train"), look, first_label=label)
        assert scene.labels.tolist() == [label]


def test_files_on_disk_agree_with_their_formats(data: DemoData) -> None:
    coco = json.loads((data.root / data.sources("detection", "train")["annotations"]).read_text())
    assert [category["name"] for category in coco["categories"]] == list(CLASSES)
    folder = data.root / data.sources("detection", "train")["images"]
    assert sorted(path.name for path in folder.iterdir()) == [image["file_name"] for image in coco["images"]]
    for entry in coco["annotations"]:
        x, y, width, height = entry["bbox"]
        assert min(x, y) >= 0 and min(width, height) > 0 and max(x + width, y + height) <= SMALL.detection_look.size
        assert 1 <= entry["category_id"] <= len(CLASSES)

    source = data.sources("segmentation", "test")
    names = sorted(path.stem for path in (data.root / source["images"]).iterdir())
    assert names == sorted(path.stem for path in (data.root / source["label_maps"]).iterdir())
    for name in names:
        label_map = Image.open(data.root / source["label_maps"] / f"{name}.png")
        image = Image.open(data.root / source["images"] / f"{name}.jpg")
        assert label_map.mode == "L" and label_map.size == image.size
        values = set(np.unique(np.asarray(label_map)).tolist())
        assert values <= {*range(len(CLASSES) + 1), IGNORE} and len(values) >= 2

    source = data.sources("classification", "train")
    lines = [line.split() for line in (data.root / source["list"]).read_text().splitlines()]
    folder = data.root / source["images"]
    assert sorted(name for name, _ in lines) == sorted(path.name for path in folder.iterdir())
    assert {int(label) for _, label in lines} == set(range(len(CLASSES)))


def test_the_seed_determines_every_byte(data: DemoData, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "same", seed=3, sizes=SMALL, progress=False)
    make_demo_data(tmp_path / "other", seed=4, sizes=SMALL, progress=False)
    assert contents(tmp_path / "same") == contents(data.root)
    one, other = "detection/train/000000.jpg", contents(tmp_path / "other")
    assert other[one] != contents(data.root)[one]


def test_scenes_do_not_depend_on_their_number(data: DemoData, tmp_path: Path) -> None:
    more = SMALL.model_copy(update={"segmentation": (9, 5)})
    make_demo_data(tmp_path, seed=3, sizes=more, progress=False)
    both = contents(data.root).keys() & contents(tmp_path).keys()
    pictures = [name for name in both if name.endswith((".jpg", ".png"))]
    assert len(pictures) > 30
    assert all((data.root / name).read_bytes() == (tmp_path / name).read_bytes() for name in pictures)


def test_a_second_call_writes_nothing_and_different_sizes_write_again(tmp_path: Path) -> None:
    make_demo_data(tmp_path, sizes=SMALL, progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make_demo_data(tmp_path, sizes=SMALL, progress=False)
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fewer = SMALL.model_copy(update={"detection": (2, 1)})
    make_demo_data(tmp_path, sizes=fewer, progress=False)
    assert len(list((tmp_path / "detection" / "train").iterdir())) == 2


def test_interrupted_demo_data_is_written_again(tmp_path: Path) -> None:
    make_demo_data(tmp_path, sizes=SMALL, progress=False)
    complete = contents(tmp_path)
    marker = json.loads((tmp_path / "demo.json").read_text())
    (tmp_path / "demo.json").write_text(json.dumps({**marker, "complete": False}))
    (tmp_path / "detection" / "train" / "000000.jpg").unlink()
    make_demo_data(tmp_path, sizes=SMALL, progress=False)
    assert contents(tmp_path) == complete


def test_a_folder_that_is_not_demo_data_is_not_modified(tmp_path: Path) -> None:
    (tmp_path / "detection").mkdir()
    (tmp_path / "detection" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is not demo data"):
        make_demo_data(tmp_path, sizes=SMALL, progress=False)
    assert (tmp_path / "detection" / "mine.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["detection"]
