"""Write the labels of PASCAL_MT.tgz, PASCAL-Context for several tasks, as png files for `configs/runs/joint/`.

    python -m allinone_ds.data.convert.pascal_mt /data/PASCAL_MT

reads the names in ImageSets/Context/train.txt and val.txt, and writes for each into labels/ of the same folder:

    semseg/NAME.png     semseg/VOC12/NAME.png, or where it is missing semseg/pascal-context/NAME.png, unchanged
    parts/NAME.png      of persons, from human_parts/NAME.mat: 0 no part, 1 head, 2 torso, 3 upper arm, 4 lower arm,
                        5 upper leg, 6 lower leg; only for images in which parts of a person are marked
    edges/NAME.png      1 where LabelMap of pascal-context/trainval/NAME.mat differs from the next pixel right or below
    normals/NAME.png    normals_distill/NAME.png, black in pixels of classes for which these normals are not trusted

The archive and these rules are those of ASTMT (Maninis et al., CVPR 2019, github.com/facebookresearch/astmt), which
MTI-Net and InvPT use too. They thin a line of two pixels to get edges; here, edges have one pixel from the start.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from allinone_ds.errors import DataError

PERSON = 15
"""Class of persons in human_parts."""
PARTS = {"torso": 2, "neck": 2, "uarm": 3, "larm": 4, "hand": 4, "uleg": 5, "lleg": 6, "foot": 6}
"""Part of the body, without l or r for its side -> id; all other parts belong to the head, which is 1."""
TRUSTED = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59,
    61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135,
    141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215,
    216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272,
    273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329,
    330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405,
    407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)  # fmt: skip
"""Ids in LabelMap of the classes that NYUv2 has too: the normals are predictions of a network trained on NYUv2."""


def convert(root: Path) -> dict[str, int]:
    """Write the label files of all images of a folder.

    Args:
        root: the unpacked PASCAL_MT.

    Returns:
        {folder below labels/: number of files}

    Raises:
        DataError: a file is missing or cannot be read.
    """
    written = dict.fromkeys(("semseg", "parts", "edges", "normals"), 0)
    for kind in written:
        (root / "labels" / kind).mkdir(parents=True, exist_ok=True)
    for name in _names(root):
        target = {kind: root / "labels" / kind / f"{name}.png" for kind in written}
        classes = _mat(root / "pascal-context" / "trainval" / f"{name}.mat")["LabelMap"]  # (H, W)
        voc = root / "semseg" / "VOC12" / f"{name}.png"
        shutil.copyfile(_existing(voc if voc.is_file() else root / "semseg" / "pascal-context" / f"{name}.png"),
                        target["semseg"])  # fmt: skip
        Image.fromarray(edges_of(classes)).save(target["edges"])
        with Image.open(_existing(root / "normals_distill" / f"{name}.png")) as picture:
            size = classes.shape[1], classes.shape[0]
            normals = np.array(picture if picture.size == size else picture.resize(size, Image.Resampling.NEAREST))
        normals[~np.isin(classes, TRUSTED)] = 0
        Image.fromarray(normals).save(target["normals"])
        parts = parts_of(_mat(root / "human_parts" / f"{name}.mat")["anno"], classes.shape)
        if parts.any():
            Image.fromarray(parts).save(target["parts"])
        for kind in ("semseg", "edges", "normals", *(["parts"] if parts.any() else [])):
            written[kind] += 1
    return written


def edges_of(classes: np.ndarray) -> np.ndarray:
    """Return where a class map (H, W) differs from the pixel on the right or below, uint8 (H, W) of 0 and 1.

    Example:
        >>> edges_of(np.array([[1, 1, 2], [1, 1, 2]])).tolist()
        [[0, 1, 0], [0, 1, 0]]
    """
    edges = np.zeros(classes.shape, dtype=np.uint8)
    edges[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    edges[:-1] |= classes[:-1] != classes[1:]
    return edges


def parts_of(anno: Any, size: tuple[int, int]) -> np.ndarray:
    """Return the parts of the persons in an annotation of Pascal-Part, uint8 (H, W) of 0..6.

    Args:
        anno: its field `anno`: the name of the image, and objects, each a class, its id, a mask and parts, each a name
            and a mask.
        size: (H, W).
    """
    labels = np.zeros(size, dtype=np.uint8)
    for _, class_id, _, parts in anno[0, 0][1][0]:
        if int(class_id[0, 0]) == PERSON and len(parts):
            for name, mask in parts[0]:
                own = str(name[0])
                labels[mask.astype(bool)] = PARTS.get(own if own in PARTS else own[1:], 1)
    return labels


def _names(root: Path) -> list[str]:
    names: dict[str, None] = {}
    for part in ("train", "val"):
        names |= dict.fromkeys(_existing(root / "ImageSets" / "Context" / f"{part}.txt").read_text().split())
    return list(names)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file}: file is missing; give the folder that PASCAL_MT.tgz was unpacked to")
    return file


def _mat(file: Path) -> dict[str, Any]:
    try:
        return scipy.io.loadmat(str(_existing(file)))
    except (ValueError, TypeError, OSError) as error:  # what scipy raises on files that are none, or end early
        raise DataError(f"{file}: cannot be read as a MATLAB file: {error}; unpack the archive again") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="write the labels of PASCAL_MT as png files into its folder labels/")
    parser.add_argument("folder", type=Path, help="the unpacked PASCAL_MT")
    try:
        written = convert(parser.parse_args(arguments).folder)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(", ".join(f"{count} {kind}" for kind, count in written.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
