"""Images and their maps: names that differ in their ends, and whether a map has colours."""

from __future__ import annotations

import os
from collections import defaultdict

from PIL import Image

PICTURES = ("images", "image", "img", "imgs", "jpegimages", "photos", "leftimg8bit", "rgb")
"""Names of folders of pictures, in lower case."""


def stem(name: str) -> str:
    """Return a file name without its suffix."""
    return os.path.splitext(name)[0]


def endings(images: list[str], maps: list[str]) -> tuple[str, str] | None:
    """Return what ends the stems of images and of their maps so that most images have a map; None if they do not."""
    image_stems, map_stems = ({stem(name) for name in names} for names in (images, maps))
    for image_end in sorted({"", _common_end(image_stems)}, key=len):
        for map_end in sorted({"", _common_end(map_stems), *_frequent_ends(map_stems)}, key=len):
            own = {stem.removesuffix(image_end) for stem in image_stems if stem.endswith(image_end)}
            other = {stem.removesuffix(map_end) for stem in map_stems if stem.endswith(map_end)}
            if len(own & other) > 0.5 * len(own):
                return image_end, map_end
    return None


def _common_end(stems: set[str]) -> str:
    """Return the common end of all stems from its first "_", "-" or "." on, "" if there is none."""
    end = os.path.commonprefix([stem[::-1] for stem in stems])[::-1]
    start = min((end.find(mark) for mark in "_-." if mark in end), default=len(end))
    return end[start:]


def _frequent_ends(stems: set[str]) -> set[str]:
    """Return the ends after the number of a name: Cityscapes has several label maps per image in one folder."""
    ends: dict[str, int] = defaultdict(int)
    for stem in stems:
        last_digit = max((i for i, c in enumerate(stem) if c.isdigit()), default=-1)
        ends[stem[last_digit + 1 :]] += 1
    return {end for end, count in ends.items() if count >= 0.1 * len(stems)}


def is_colored(path: str) -> bool:
    """Return whether an image has several channels."""
    with Image.open(path) as picture:
        return picture.mode not in ("1", "L", "P", "I", "I;16")
