"""Two detection sets with different classes, made of the demo data: clothes are labelled in one, shoes in the other.

The images of both show all products. No image is in both sets, and what a set does not label is in its images all the
same, as in public data sets of people and of cars.

    python -m allinone_ds.data.demo.two_sets runs/demo_data
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from allinone_ds.data.demo.folders import make_demo_data
from allinone_ds.data.demo.scenes import SPLITS

SETS = {
    "clothes": ("t-shirt", "trouser", "pullover", "dress", "coat", "shirt"),
    "shoes": ("sandal", "sneaker", "ankle boot"),
}
"""Name of a set -> its classes."""


def write_two_sets(root: Path) -> None:
    """Write two_sets/NAME/SPLIT and two_sets/NAME/SPLIT.json: every other image of the detection set of the demo.

    Args:
        root: folder of the demo data.
    """
    for split in SPLITS:
        table = json.loads((root / "detection" / f"{split}.json").read_text())
        for number, (name, classes) in enumerate(SETS.items()):
            target = root / "two_sets" / name / split
            target.mkdir(parents=True, exist_ok=True)
            images = table["images"][number :: len(SETS)]
            for image in images:
                shutil.copyfile(root / "detection" / split / image["file_name"], target / image["file_name"])
            categories = [category for category in table["categories"] if category["name"] in classes]
            of_images, of_classes = {image["id"] for image in images}, {category["id"] for category in categories}
            boxes = table["annotations"]
            boxes = [box for box in boxes if box["image_id"] in of_images and box["category_id"] in of_classes]
            content = {"images": images, "annotations": boxes, "categories": categories}
            target.with_suffix(".json").write_text(json.dumps(content))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make_demo_data(folder)
    write_two_sets(folder)
