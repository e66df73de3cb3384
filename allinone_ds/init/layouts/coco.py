"""COCO: a json of images, boxes and categories, and a folder of images."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from allinone_ds.init.file_tree import FileTree, nearness, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts

_TRIED = 50  # file names of a json that are looked up


def find(tree: FileTree) -> list[FoundTask]:
    """Return the tasks of the COCO jsons in a folder: boxes, and masks and keypoints if they have any."""
    parts: dict[str | None, list[_Json]] = {}
    notes = []
    for file in tree.with_suffix(".json"):
        content = _read(tree, file)
        if content is None:
            continue
        folder = _images_folder(tree, content["images"], os.path.dirname(file))
        if folder is None:
            notes.append(f"{file} is a COCO json, but its images are not here")
            continue
        source = {"format": "coco", "images": tree.reference(folder), "annotations": tree.reference(file)}
        parts.setdefault(part_of(file), []).append(_Json(source, *_parts(content)))
    if not parts:
        tree.remarks += notes
        return []
    chosen: dict[str, dict[str | None, _Json]] = {kind: {} for kind in ("detection", "instances", "keypoints")}
    for part, jsons in parts.items():
        # COCO itself has instances_*.json and person_keypoints_*.json, both with boxes
        jsons.sort(key=lambda json: "instances" not in os.path.basename(json.source["annotations"]))
        first = jsons[0]
        with_points = [json for json in jsons if json.points and json.source["images"] == first.source["images"]]
        chosen["detection"][part] = first
        chosen["instances"] |= {part: first} if first.masks else {}
        chosen["keypoints"] |= {part: with_points[0]} if with_points else {}
        unused = [json.source["annotations"] for json in jsons if json not in (first, *with_points[:1])]
        if unused:
            where = f"for {part}" if part else "in one folder"
            notes.append(f"several COCO jsons {where}; not used: {', '.join(unused)}")
    tasks = []
    for kind, of_kind in chosen.items():
        if of_kind and len(of_kind) == len(parts):
            train, test, more = choose_parts(of_kind)
            own = {} if kind == "detection" else {"kind": kind}
            sources = [None if json is None else {**json.source, **own} for json in (train, test)]
            task = FoundTask(kind, "COCO", sources[0] or {}, sources[1], notes=more)
            if kind == "keypoints":
                task.options = {"points": list(train.points)}
            tasks.append(task)
    tasks[0].notes[:0] = notes
    return tasks


class _Json(NamedTuple):
    """A COCO json."""

    source: dict[str, Any]
    masks: bool
    """Whether its objects have masks."""
    points: Sequence[str]
    """Names of the keypoints of its objects; empty if they have none."""


def _parts(content: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Return whether the objects of a json have masks, and the names of their keypoints."""
    objects = [a for a in content["annotations"] if isinstance(a, dict) and not a.get("iscrowd")]
    masks = bool(objects) and all(a.get("segmentation") for a in objects)
    count = next((len(a["keypoints"]) // 3 for a in objects if isinstance(a.get("keypoints"), list)), 0)
    named = (c.get("keypoints") for c in content["categories"] if isinstance(c, dict))
    names = next((list(map(str, points)) for points in named if points), [f"point_{n}" for n in range(count)])
    return masks, names if count else []


def _read(tree: FileTree, file: str) -> dict[str, Any] | None:
    """Return the content of a COCO json with boxes, None for any other json."""
    try:
        content = json.loads((tree.root / file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        return None
    has_boxes = any(isinstance(a, dict) and isinstance(a.get("bbox"), list) for a in content["annotations"])
    if not has_boxes:
        tree.remarks.append(
            f"{file} is a COCO json, but none of its {len(content['annotations'])} annotations has a bbox"
        )
    return content if has_boxes else None


def _images_folder(tree: FileTree, images: list[Any], beside: str) -> str | None:
    """Return the folder that the most `file_name`s are relative to, None if no image exists."""
    names = [str(image["file_name"]) for image in images if isinstance(image, dict) and image.get("file_name")]
    names = names[:: max(len(names) // _TRIED, 1)]
    hits: Counter[str] = Counter()
    for name in names:
        for folder in {beside, os.path.dirname(beside), "", *tree.folders()}:
            hits[folder] += os.path.normpath(os.path.join(folder, name)) in tree.known
    best = max(
        hits, key=lambda f: (hits[f], part_of(f) == part_of(beside), nearness(f, beside)), default=None
    )  # equal names occur in several folders
    return best if best is not None and hits[best] else None
