"""COCO: a json of images, boxes and categories, and a folder of images."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from allinone_ds.init.file_tree import FileTree, nearness, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts

_TRIED = 50  # file names of a json that are looked up


def find(tree: FileTree) -> list[FoundTask]:
    """Return the detection task of the COCO jsons in a folder, or nothing."""
    parts: dict[str | None, list[dict[str, Any]]] = {}
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
        parts.setdefault(part_of(file), []).append(source)
    if not parts:
        tree.remarks += notes
        return []
    for part, sources in parts.items():
        # COCO itself has instances_*.json and person_keypoints_*.json, both with boxes
        sources.sort(key=lambda source: "instances" not in os.path.basename(source["annotations"]))
        if len(sources) > 1:
            unused = ", ".join(source["annotations"] for source in sources[1:])
            notes.append(f"several COCO jsons {f'for {part}' if part else 'in one folder'}; not used: {unused}")
    train, test, chosen = choose_parts({part: sources[0] for part, sources in parts.items()})
    return [FoundTask("detection", "COCO", train, test, notes=notes + chosen)]


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
