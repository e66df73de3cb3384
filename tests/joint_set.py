"""A small set of images with labels for three tasks, and a run that trains them as a joint group or separately."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from allinone_ds.data import JointDataset
from tests.tiny import TINY

COLORS = ((250, 60, 60), (60, 250, 60), (60, 60, 250))
CLASSES = {"seg": ["ground", "red", "green", "blue"], "det": ["red", "green", "blue"], "cls": ["none", "one", "two"]}
LABELLED = {"seg": 12, "det": 7, "cls": 10}
"""Images of the train set with labels of each task; the test set has 5 images with all labels."""


class Gaps(JointDataset):
    """Four images, of which two have no label of any task."""

    kinds = {"seg": "segmentation", "cls": "classification"}
    classes_of = {"seg": ["sky", "ground"], "cls": ["day", "night"]}

    def __init__(self, root: Path) -> None:
        self.name = "gaps"

    def __len__(self) -> int:
        return 4

    def rows(self, task: str) -> list[int]:
        return [1, 3]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = tv_tensors.Image(torch.full((3, 32, 32), 60 * index, dtype=torch.uint8))
        mask = tv_tensors.Mask(torch.full((32, 32), index // 2, dtype=torch.uint8))
        targets = {"seg": {"mask": mask}, "cls": {"label": index // 2}} if index % 2 else {}
        return {"image": image, "path": f"{index}.png", "index": index, "targets": targets}


def make_joint_set(root: Path) -> None:
    """Write train/ and test/, each with images/, maps/, boxes.json and list.txt."""
    rng = np.random.RandomState(0)
    for part, count in (("train", LABELLED["seg"]), ("test", 5)):
        for folder in ("images", "maps"):
            (root / part / folder).mkdir(parents=True)
        images, boxes, lines = [], [], []
        for number in range(count):
            image = rng.randint(0, 40, (48, 64, 3)).astype(np.uint8)
            stored = np.zeros((48, 64), np.uint8)
            for place in range(number % 3):
                x, y, k = rng.randint(2, 40), rng.randint(2, 26), (number + place) % 3
                image[y : y + 16, x : x + 18], stored[y : y + 16, x : x + 18] = COLORS[k], 1 + k
                box = {"bbox": [int(x), int(y), 18, 16], "area": 288, "iscrowd": 0}
                boxes.append({"id": len(boxes) + 1, "image_id": number, "category_id": 1 + k, **box})
            stored[: 3 * number] = 255
            Image.fromarray(image).save(root / part / "images" / f"{number:03}.png")
            Image.fromarray(stored).save(root / part / "maps" / f"{number:03}.png")
            images.append({"id": number, "file_name": f"{number:03}.png", "height": 48, "width": 64})
            lines.append(f"{number:03}.png {number % 3}")
        with_boxes = images[: LABELLED["det"]]
        content = {
            "images": with_boxes,
            "annotations": [box for box in boxes if box["image_id"] < len(with_boxes)],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES["det"])],
        }
        (root / part / "boxes.json").write_text(json.dumps(content))
        (root / part / "list.txt").write_text("\n".join(lines[: LABELLED["cls"]]) + "\n")


def label_sources(part: str = "train") -> dict[str, dict[str, Any]]:
    """Return the source of each task's labels, without images."""
    return {
        "seg": {"format": "label_maps", "label_maps": f"{part}/maps"},
        "det": {"format": "coco", "annotations": f"{part}/boxes.json"},
        "cls": {"format": "image_list", "list": f"{part}/list.txt", "classes": CLASSES["cls"]},
    }


def joint_source(part: str = "train", **more: Any) -> dict[str, Any]:
    """Return the source of the group."""
    return {"format": "joint", "images": f"{part}/images", "labels": label_sources(part), "partial": True, **more}


def joint_run(folder: Path, **group: Any) -> dict[str, Any]:
    """Return the content of the file of a run whose group `rooms` reads the images of `folder`/data."""
    return {
        "name": "rooms",
        "output_dir": str(folder / "run"),
        "data_root": str(folder / "data"),
        "model": {"backbone": {"stem": "conv", "config": dict(TINY)}},
        "tasks": {
            "seg": {"type": "segmentation", "options": {"width": 32}, "classes": CLASSES["seg"]},
            "det": {"type": "detection", "options": {"width": 32, "num_convs": 1}},
            "cls": {"type": "classification"},
        },
        "joint": {
            "rooms": {
                "tasks": ["seg", "det", "cls"],
                "image_size": 32,
                "batch_size": 3,
                "train": joint_source(),
                "test": joint_source("test"),
                **group,
            }
        },
        "trainer": {"max_steps": 3, "learning_rate": 0.01, "optim": "sgd", "logging_steps": 1, "save_strategy": "no"},
    }


def separate_run(folder: Path) -> dict[str, Any]:
    """Return the content of the file of a run with the same tasks on data of their own, all of it in each step."""
    content = joint_run(folder)
    del content["joint"]
    for name, task in content["tasks"].items():
        task |= {"image_size": 32, "batch_size": LABELLED[name]}
        task["train"] = {**label_sources()[name], "images": "train/images"}
    return content
