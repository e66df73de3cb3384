"""The ready configurations read the layouts in which public data sets with several labels per image are unpacked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from allinone_ds.data.check import check_sources
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
        save(root / "depth" / f"{name}.npy", RNG.uniform(0.5, 9, SIZE).astype(np.float32))
        save(root / "normals" / f"{name}.npy", directions().astype(np.float32))
        save(root / "edge" / f"{name}.npy", ids(1))
    lines(root / "gt_sets" / "train.txt", names[:4])
    lines(root / "gt_sets" / "val.txt", names[4:])


def cityscapes(root: Path) -> None:
    for part, city in (("train", "aachen"), ("val", "frankfurt")):
        for number in range(3):
            name = f"{city}/{city}_{number:06}_000019"
            save(root / "leftImg8bit" / part / f"{name}_leftImg8bit.png", picture())
            stored = ids(19)
            stored[stored == 19] = 255
            save(root / "gtFine" / part / f"{name}_gtFine_labelTrainIds.png", stored)
            save(root / "gtFine" / part / f"{name}_gtFine_labelIds.png", ids(33))
            save(root / "gtFine" / part / f"{name}_gtFine_color.png", picture())
            save(root / "disparity" / part / f"{name}_disparity.png", ids(30000, np.uint16, least=257))


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
            for category in (1, 3):
                record = {"id": len(objects) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                objects.append({**record, "bbox": [5, 5, 25, 25], "area": 625, "segmentation": polygon})
        person = [{**o, "keypoints": [10, 10, 2] * 17, "num_keypoints": 17}
                  for o in objects if o["category_id"] == 1]  # fmt: skip
        keypoints = {"id": 1, "name": "person", "keypoints": points, "skeleton": [[1, 2]]}
        for kind, records, categories in (
            ("instances", objects, [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]),
            ("person_keypoints", person, [keypoints]),
        ):
            content = {"images": images, "annotations": records, "categories": categories}
            lines(root / "annotations" / f"{kind}_{part}.json", [json.dumps(content)])


def pascal_context(root: Path) -> None:
    names = [f"2008_{number:06}" for number in range(6)]
    for number, name in enumerate(names):
        save(root / "JPEGImages" / f"{name}.jpg", picture())
        save(root / "semseg" / "pascal-context" / f"{name}.png", ids(20))
        save(root / "sal_distill" / f"{name}.png", ids(255))
        save(root / "normals_distill" / f"{name}.png", ((directions() + 1) * 127.5).round().astype(np.uint8))
        save(root / "edges" / f"{name}.png", ids(1))
        if number % 2:
            save(root / "parts" / f"{name}.png", ids(6))
    save(root / "JPEGImages" / "2007_000001.jpg", picture())  # of VOC, without labels
    lines(root / "ImageSets" / "Context" / "train.txt", names[:4])
    lines(root / "ImageSets" / "Context" / "val.txt", names[4:])


SMALL = {"upernet": HEADS["upernet"][2], "rf_detr": HEADS["rf_detr"][2]}
LAYOUTS: dict[str, tuple[Callable[[Path], None], dict[str, int]]] = {
    "nyuv2": (nyuv2, {"rooms": 4}),
    "cityscapes": (cityscapes, {"streets": 3}),
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


def test_numbers_of_the_public_layouts_arrive_as_they_are_meant(tmp_path: Path) -> None:
    for name in ("nyuv2", "cityscapes", "pascal_context"):
        LAYOUTS[name][0](tmp_path / name)
    [rooms] = [data.dataset for data in open_train_data(small("nyuv2", tmp_path / "nyuv2")).values()]
    stored = np.array(Image.open(tmp_path / "nyuv2" / "segmentation" / "0000.png"))
    mask = rooms[0]["targets"]["seg"]["mask"].numpy()
    assert ((mask == 255) == (stored == 0)).all() and (mask[stored > 0] == stored[stored > 0] - 1).all()
    [streets] = [data.dataset for data in open_train_data(small("cityscapes", tmp_path / "cityscapes")).values()]
    file = next((tmp_path / "cityscapes" / "disparity" / "train").rglob("*_000000_000019_disparity.png"))
    stored = np.array(Image.open(file)).astype(np.float64)
    found = streets[0]["targets"]["disparity"]["depth"].numpy()
    assert np.abs(found - (stored - 1) / 256).max() < 0.01  # the offset of a 256th of a pixel is left out
    [images] = [data.dataset for data in open_train_data(small("pascal_context", tmp_path / "pascal_context")).values()]
    assert [sorted(images[index]["targets"]) for index in (0, 1)] == [
        ["edges", "normals", "saliency", "seg"],
        ["edges", "normals", "parts", "saliency", "seg"],
    ]
