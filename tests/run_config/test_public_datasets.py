"""The ready configurations read the layouts in which public data sets with several labels per image are unpacked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from allinone_ds.data.check import check_sources
from allinone_ds.data.convert import pascal_mt as pascal
from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.build import build_model, classes_of, open_test_data, open_train_data
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig, load_config
from tests.tasks.heads import HEADS
from tests.tiny import TINY

SIZE = (48, 64)
RNG = np.random.RandomState(0)


def save(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, values)
    else:
        Image.fromarray(values).save(file)


def picture() -> np.ndarray:
    return RNG.randint(0, 255, (*SIZE, 3)).astype(np.uint8)


def ids(most: int, dtype: type = np.uint8, least: int = 0) -> np.ndarray:
    return RNG.randint(least, most + 1, SIZE).astype(dtype)


def directions() -> np.ndarray:
    vectors = RNG.randn(*SIZE, 3)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def lines(file: Path, texts: Sequence[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{text}\n" for text in texts))


def nyuv2(root: Path) -> None:
    names = [f"{number:04}" for number in range(6)]
    for name in names:
        save(root / "images" / f"{name}.jpg", picture())
        save(root / "segmentation" / f"{name}.png", ids(40))
        unknown = RNG.rand(*SIZE) < 0.2  # zeros in depth and normals
        save(root / "depth" / f"{name}.npy", np.where(unknown, 0, RNG.uniform(0.5, 9, SIZE)).astype(np.float32))
        save(root / "normals" / f"{name}.npy", np.where(unknown[..., None], 0, directions()).astype(np.float32))
        save(root / "edge" / f"{name}.npy", ids(1))
    lines(root / "gt_sets" / "train.txt", names[:4])
    lines(root / "gt_sets" / "val.txt", names[4:])


def nyuv2_libmtl(root: Path) -> None:
    """train/{image,label,depth,normal}/N.npy: images of floats in 0..1, labels of floats with -1, depth (H, W, 1)."""
    for part, count in (("train", 4), ("val", 2)):
        for number in range(count):
            unknown = RNG.rand(*SIZE, 1) < 0.2
            save(root / part / "image" / f"{number}.npy", RNG.rand(*SIZE, 3))
            save(root / part / "label" / f"{number}.npy", ids(13, np.float32) - 1)
            save(root / part / "depth" / f"{number}.npy", np.where(unknown, 0, RNG.uniform(0.5, 9, (*SIZE, 1))))
            save(root / part / "normal" / f"{number}.npy", np.where(unknown, 0, directions()))


def cityscapes(root: Path) -> None:
    """As unpacked: label ids, instance ids of 16 bits, colours and polygons beside each other, and parts not used."""
    for part, city in (("train", "aachen"), ("train", "bochum"), ("val", "frankfurt"), ("test", "berlin")):
        for number in range(2):
            name = f"{city}/{city}_{number:06}_000019"
            save(root / "leftImg8bit" / part / f"{name}_leftImg8bit.png", picture())
            fine = root / "gtFine" / part
            save(fine / f"{name}_gtFine_labelIds.png", ids(33))
            save(fine / f"{name}_gtFine_instanceIds.png", ids(33005, np.uint16))
            save(fine / f"{name}_gtFine_color.png", RNG.randint(0, 255, (*SIZE, 4)).astype(np.uint8))
            lines(fine / f"{name}_gtFine_polygons.json", [json.dumps({"imgHeight": SIZE[0], "objects": []})])
            stored = np.where(RNG.rand(*SIZE) < 0.2, 0, ids(30000, np.uint16, least=1)).astype(np.uint16)
            stored[0, 0] = 1
            save(root / "disparity" / part / f"{name}_disparity.png", stored)


def celeba(root: Path) -> None:
    names = [f"Attribute_{number}" for number in range(40)]
    files = [f"{number:06}.jpg" for number in range(1, 9)]
    for file in files:
        save(root / "img_align_celeba" / file, picture())
    rows = [f"{file}  {' '.join(str(v).rjust(2) for v in RNG.choice([-1, 1], 40))}" for file in files]
    lines(root / "list_attr_celeba.txt", [len(files), " ".join(names) + " ", *rows])
    lines(root / "list_eval_partition.txt", [f"{file} {number // 4}" for number, file in enumerate(files)])


def coco(root: Path) -> None:
    sides = [f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
             for side in ("left", "right")]  # fmt: skip
    points = ["nose", *sides]
    polygon = [[5, 5, 30, 5, 30, 30, 5, 30]]
    for part in ("train2017", "val2017"):
        images, objects = [], []
        for number in range(3):
            save(root / part / f"{number:012}.jpg", picture())
            images.append({"id": number, "file_name": f"{number:012}.jpg", "height": SIZE[0], "width": SIZE[1]})
            for category in (1, 3) if number else ():  # the first image has no object
                record = {"id": len(objects) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                objects.append({**record, "bbox": [5, 5, 25, 25], "area": 625, "segmentation": polygon})
            if number == 2:
                runs = {"size": list(SIZE), "counts": [100, SIZE[0] * SIZE[1] - 100]}
                crowd = {"id": len(objects) + 1, "image_id": number, "category_id": 1, "iscrowd": 1}
                objects.append({**crowd, "bbox": [2, 0, 60, 47], "area": 2900, "segmentation": runs})
        person = [{**o, "keypoints": [0 if o["iscrowd"] else v for v in (10, 10, 2)] * 17, "num_keypoints": 17}
                  for o in objects if o["category_id"] == 1]  # fmt: skip
        keypoints = {"id": 1, "name": "person", "keypoints": points, "skeleton": [[1, 2]]}
        for kind, records, categories in (
            ("instances", objects, [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]),
            ("person_keypoints", person, [keypoints]),
        ):
            content = {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "by", "url": ""}]}
            content |= {"images": images, "annotations": records, "categories": categories}
            lines(root / "annotations" / f"{kind}_{part}.json", [json.dumps(content)])


def pascal_mt(root: Path) -> None:
    """As unpacked; the second and fourth image show a person with parts, the third one without parts."""
    names = [f"2008_{number:06}" for number in range(6)]
    field = lambda **values: np.array([[tuple(values.values())]], dtype=[(key, object) for key in values])  # noqa: E731
    for number, name in enumerate(names):
        save(root / "JPEGImages" / f"{name}.jpg", picture())
        stored = ids(20)
        if number % 3 == 0:  # of VOC 2012, with its border
            stored[0] = 255
            save(root / "semseg" / "VOC12" / f"{name}.png", stored)
        else:
            save(root / "semseg" / "pascal-context" / f"{name}.png", stored)
        save(root / "sal_distill" / f"{name}.png", ids(255))
        save(root / "normals_distill" / f"{name}.png", ((directions() + 1) * 127.5).round().astype(np.uint8))
        classes = np.repeat(RNG.choice([3, 5, 454], (SIZE[0], SIZE[1] // 16)), 16, axis=1)  # 5 is not trusted
        matlab(root / "pascal-context" / "trainval" / f"{name}.mat", LabelMap=classes.astype(np.uint16))
        whole, left = np.ones(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
        left[:, :8] = 1
        parts = np.concatenate([field(part_name=part, mask=np.roll(left, 8 * n, 1))
                                for n, part in enumerate(("head", "lear", "torso", "luarm", "rlleg"))], 1)  # fmt: skip
        none = np.zeros((0, 0))
        people = field(**{"class": "person", "class_ind": 15, "mask": whole, "parts": parts if number % 2 else none})
        table = field(**{"class": "table", "class_ind": 11, "mask": whole, "parts": none})
        objects = table if number == 0 else np.concatenate([table, people], 1)
        matlab(root / "human_parts" / f"{name}.mat", anno=field(imname=name, objects=objects))
    save(root / "JPEGImages" / "2007_000001.jpg", picture())  # of VOC, without labels
    lines(root / "ImageSets" / "Context" / "train.txt", names[:4])
    lines(root / "ImageSets" / "Context" / "val.txt", names[4:])


def matlab(file: Path, **values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(file, values)


def pascal_context(root: Path) -> None:
    pascal_mt(root)
    assert pascal.main([str(root)]) == 0


SMALL = {"upernet": HEADS["upernet"][2], "rf_detr": HEADS["rf_detr"][2]}
LAYOUTS: dict[str, tuple[Callable[[Path], None], dict[str, int]]] = {
    "nyuv2": (nyuv2, {"rooms": 4}),
    "nyuv2_13": (nyuv2, {"rooms": 4}),
    "nyuv2_libmtl": (nyuv2_libmtl, {"rooms": 4}),
    "cityscapes": (cityscapes, {"streets": 4}),
    "celeba": (celeba, {"attributes": 4}),
    "coco": (coco, {"scenes": 3}),
    "pascal_context": (pascal_context, {"images": 4}),
}


def small(name: str, root: Path) -> RunConfig:
    """Return the configuration with a tiny backbone and small heads."""
    file = f"configs/runs/joint/{name}.yaml"
    backbone = ["model.backbone.checkpoint=null", f"model.backbone.config={json.dumps(TINY)}"]
    overrides = [f"data_root={root}", *backbone, "model.backbone.out_indices=[1, 2]"]
    config = load_config(file, overrides)
    overrides += [f"joint.{group}.image_size=32" for group in config.joint]
    overrides += [f"tasks.{task}.image_size=32" for task, keys in config.tasks.items() if not keys.in_group]
    overrides += [f"tasks.{task}.options={json.dumps(SMALL[keys.head])}"
                  for task, keys in config.tasks.items() if keys.head in SMALL]  # fmt: skip
    return load_config(file, overrides)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_ready_configuration_reads_trains_and_predicts(name: str, tmp_path: Path) -> None:
    make, sizes = LAYOUTS[name]
    make(tmp_path)
    config = small(name, tmp_path)
    train = open_train_data(config)
    assert {unit: len(data.dataset) for unit, data in train.items()} == sizes
    classes = classes_of(train)
    test = open_test_data(config, classes)
    model: AllInOneModel = build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes)).train()
    for unit, data in train.items():
        problems = check_sources({unit: data.dataset}, tmp_path, progress=False)
        assert [str(p) for p in problems if p.level == "error"] == []
        batch = data.collate([data.transform(data.dataset[index]) for index in range(2)])
        names = unit if data.joint is None else list(data.joint.tasks)
        outputs = model(task=names, **batch)
        losses = [outputs.loss] if data.joint is None else [out.loss for out in outputs.values()]
        torch.stack(losses).sum().backward()
        assert all(loss.isfinite() for loss in losses)
        assert all(p.grad is not None for n, p in model.named_parameters() if not n.endswith("mask_token"))
    model.eval()
    for unit, data in test.items():
        sample = data.dataset[0]
        batch = data.collate([data.transform(sample)])
        tasks = [unit] if data.joint is None else list(data.joint.tasks)
        with torch.no_grad():
            outputs = model(task=tasks, pixel_values=batch["pixel_values"])
        for task in tasks:
            assert len(model.tasks[task].predict(outputs[task], [SIZE])) == 1


NYU_13 = [0, 12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5, 7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7,
          7, 7, 7, 7, 7, 6, 7]  # fmt: skip
"""classMapping13 of class13Mapping.mat: class of 13 (0: none) of each of the 40 classes."""
CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
              27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
"""trainId of each id in helpers/labels.py of cityscapesScripts that has one."""


def only(name: str, root: Path) -> Any:
    [data] = open_train_data(small(name, root)).values()
    return data.dataset


def test_numbers_of_nyuv2_and_cityscapes_arrive_as_they_are_meant(tmp_path: Path) -> None:
    for name in ("nyuv2", "cityscapes"):
        LAYOUTS[name][0](tmp_path / name)
    rooms, coarse = only("nyuv2", tmp_path / "nyuv2"), only("nyuv2_13", tmp_path / "nyuv2")
    stored = np.array(Image.open(tmp_path / "nyuv2" / "segmentation" / "0000.png"))
    mask = rooms[0]["targets"]["seg"]["mask"].numpy()
    assert ((mask == 255) == (stored == 0)).all() and (mask[stored > 0] == stored[stored > 0] - 1).all()
    merged = np.array(NYU_13)[stored] - 1
    assert np.array_equal(coarse[0]["targets"]["seg"]["mask"].numpy(), np.where(merged < 0, 255, merged))
    assert coarse.classes_of["seg"][11] == "wall" and len(coarse.classes_of["seg"]) == 13
    depth = np.load(tmp_path / "nyuv2" / "depth" / "0000.npy")
    assert np.array_equal(rooms[0]["targets"]["depth"]["depth"], np.where(depth == 0, np.nan, depth), equal_nan=True)
    assert np.array_equal(rooms[0]["targets"]["normals"]["normals"].isnan().all(0).numpy(), depth == 0)
    streets = only("cityscapes", tmp_path / "cityscapes")
    base = "aachen_000000_000019"
    [index] = [i for i in range(len(streets)) if base in streets.path(i)]
    found = streets[index]["targets"]
    stored = np.array(Image.open(tmp_path / f"cityscapes/gtFine/train/aachen/{base}_gtFine_labelIds.png"))
    assert np.array_equal(found["seg"]["mask"].numpy(), np.vectorize(lambda i: CITYSCAPES.get(i, 255))(stored))
    stored = np.array(Image.open(tmp_path / f"cityscapes/disparity/train/aachen/{base}_disparity.png"))
    expected = np.where(stored < 2, np.nan, (stored.astype(np.float64) - 1) / 256)
    np.testing.assert_allclose(found["disparity"]["depth"].numpy(), expected, rtol=1e-6)


def test_labels_of_pascal_mt_are_what_the_archive_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pascal_context(tmp_path)
    assert capsys.readouterr().out == "6 semseg, 3 parts, 6 edges, 6 normals\n"
    images = only("pascal_context", tmp_path)
    assert [sorted(images[index]["targets"]) for index in (0, 1, 2)] == [
        ["edges", "normals", "saliency", "seg"],
        ["edges", "normals", "parts", "saliency", "seg"],
        ["edges", "normals", "saliency", "seg"],
    ]
    found = images[1]["targets"]
    assert found["parts"]["mask"][5, ::8].tolist() == [1, 1, 2, 3, 6, 0, 0, 0]
    classes = scipy.io.loadmat(tmp_path / "pascal-context" / "trainval" / "2008_000001.mat")["LabelMap"]
    assert np.array_equal(found["normals"]["normals"].isnan().any(0).numpy(), classes == 5)
    right = np.zeros(SIZE, dtype=bool)
    right[:, :-1] = classes[:, :-1] != classes[:, 1:]
    right[:-1] |= classes[:-1] != classes[1:]
    assert np.array_equal(found["edges"]["edges"].numpy(), right)
    salient = np.array(Image.open(tmp_path / "sal_distill" / "2008_000001.png")) / 255 > 0.5
    assert np.array_equal(found["saliency"]["saliency"].numpy(), salient)
    assert (images[0]["targets"]["seg"]["mask"][0] == 255).all()  # the border of VOC 2012
    (tmp_path / "semseg" / "VOC12" / "2008_000003.png").unlink()
    assert pascal.main([str(tmp_path)]) == 2
    assert "pascal-context/2008_000003.png: file is missing; give the folder that" in capsys.readouterr().err
