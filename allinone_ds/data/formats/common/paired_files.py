"""Images and the files with their targets: two folders with equal relative paths except for suffixes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from allinone_ds.data.base import Problem
from allinone_ds.data.formats.common.listing import NUMPY_SUFFIX, is_image, unread_files, unused_images, walk_files


def pair_files(
    images: tuple[Path, str],
    targets: tuple[Path, str],
    what: str,
    more: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> tuple[list[tuple[str, str]], list[Problem]]:
    """Return for every image with a target both files relative to their folders, and the faults that were found.

    In a folder without any image, numpy files are the images, or the targets.

    Args:
        images: folder of the images, and what ends their names before the file suffix.
        targets: the same of the targets.
        what: what messages call a target, for example "label map".
        more: file suffixes of targets beside those of images, for example ".npy".
        names: relative paths without suffixes of the images to use; None uses all.

    Raises:
        DataError: a folder cannot be listed.
    """
    problems: list[Problem] = []
    of_image = _by_stem(*images, (), problems)
    of_target = _by_stem(*targets, more, problems)
    if names is not None:
        missing = [name for name in names if name not in of_image and name not in of_target]
        reason = f"is listed, but has neither an image nor a {what}; add them or remove the name from the list"
        problems += [Problem(str(images[0] / name), reason) for name in missing]
        of_image, of_target = ({name: of[name] for name in names if name in of} for of in (of_image, of_target))
    lower = {stem.lower(): of_target[stem] for stem in of_target.keys() - of_image.keys()}
    for stem in of_image.keys() - of_target.keys():
        wanted = f"{targets[0] / stem}{targets[1]}{'.*' if more else '.png'}"
        near = lower.get(stem.lower())
        hint = f" ({near} is there, whose case differs)" if near is not None else ""
        reason = f"has no {what} {wanted}{hint}; add the {what} or remove the image"
        problems.append(Problem(str(images[0] / of_image[stem]), reason, unlabelled=True))
    for stem in of_target.keys() - of_image.keys():
        wanted = f"{images[0] / stem}{images[1]}.*"
        reason = f"has no image {wanted}; add the image or remove the {what}"
        problems.append(Problem(str(targets[0] / of_target[stem]), reason))
    return [(of_image[stem], of_target[stem]) for stem in of_image if stem in of_target], sorted(problems)


def _by_stem(folder: Path, suffix: str, more: Sequence[str], problems: list[Problem]) -> dict[str, str]:
    """Return {path without suffixes: path} of the files below a folder; report equal stems as faults."""
    groups: dict[str, list[str]] = defaultdict(list)
    others = []
    every = walk_files(folder)
    if not any(map(is_image, every)):
        more = (*more, NUMPY_SUFFIX)
    kept = [file for file in every if is_image(file) or _ends(file, more)]
    problems += unread_files(folder, [file for file in every if not _ends(file, more)])
    for file in kept:
        stem = os.path.splitext(file)[0]
        if stem.endswith(suffix):
            groups[stem.removesuffix(suffix)].append(file)
        else:
            others.append(file)
    problems += unused_images(folder, others, f"whose names do not end with '{suffix}'")
    for files in groups.values():
        if len(files) > 1:
            reason = f"differs only in its suffix from {', '.join(files[1:])}; keep one of these files"
            problems.append(Problem(str(folder / files[0]), reason))
    return {stem: files[0] for stem, files in groups.items()}


def _ends(file: str, suffixes: Sequence[str]) -> bool:
    return file.lower().endswith(tuple(suffixes)) and not os.path.basename(file).startswith(".")
