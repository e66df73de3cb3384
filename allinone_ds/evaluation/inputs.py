"""From what a user gives to images: opened images in Python, and files, folders, patterns and videos of a command."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from allinone_ds.data.images import IMAGE_SUFFIXES, read_image, to_rgb
from allinone_ds.errors import BrokenSample, ConfigError
from allinone_ds.evaluation.video import VIDEO_SUFFIXES

AnyImage = str | Path | Image.Image | Tensor | np.ndarray
"""An image file, a PIL image, a uint8 RGB tensor (3, H, W), or a uint8 RGB array (H, W, 3)."""


def open_image(image: AnyImage) -> Tensor:
    """Return an image as uint8 RGB (3, H, W). A file is rotated as its EXIF data says, an opened image is not.

    Args:
        image: a file, a PIL image, a uint8 tensor (3, H, W) or a uint8 array (H, W, 3), the last two in RGB.

    Raises:
        ConfigError: the image cannot be read, or has a different type, shape or dtype.

    Example:
        >>> open_image(Image.new("L", (64, 48))).shape
        torch.Size([3, 48, 64])
        >>> open_image(np.zeros((48, 64, 3), np.uint8)).shape
        torch.Size([3, 48, 64])
    """
    if isinstance(image, str | Path):
        if is_video(image):
            raise ConfigError(f"{image} is a video; `allinone-ds predict` reads it, predict() takes images")
        try:
            return read_image(str(image))
        except BrokenSample as error:
            raise ConfigError(str(error)) from error
    if isinstance(image, Image.Image):
        try:
            return tv_tensors.Image(torch.from_numpy(to_rgb(image)).permute(2, 0, 1))
        except ValueError as error:
            raise ConfigError(f"image of mode {image.mode}: {error}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ConfigError(f"image array of {image.dtype} {image.shape}; give uint8 (H, W, 3) in RGB, one per image")
        return tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
    if not isinstance(image, Tensor):
        raise ConfigError(
            f"image of type {type(image).__name__}; give a file, a PIL image, a uint8 array (H, W, 3) or a uint8 "
            "tensor (3, H, W)"
        )
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 or not image.numel():
        raise ConfigError(f"image tensor of {image.dtype} {tuple(image.shape)}; give uint8 (3, H, W) in RGB")
    return tv_tensors.Image(image)


def is_video(file: str | Path) -> bool:
    """Return whether a file has the suffix of a video."""
    return os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES


@dataclass
class Input:
    """One image or video file to predict on.

    Attributes:
        file: the file.
        name: name of its results, relative to the output folder and without suffix.
    """

    file: Path
    name: str


def find_inputs(items: Sequence[str | Path], tasks: Sequence[str], output: Path) -> tuple[list[Input], dict[str, str]]:
    """Return the files that a command's arguments mean, and why an argument means none.

    A folder stands for all images and videos below it, without hidden ones and without `output`; a pattern with *, ?
    or [] for the images and videos that match. A result is named after its file: by the stem of a single file, by the
    path below the folder otherwise. Where the results of two files would be the same, both get more of their path.

    Args:
        items: files, folders and patterns.
        tasks: the tasks whose pictures are written next to each result.
        output: folder of the results.

    Returns:
        The inputs in the order of `items`, and {item: reason}.

    Raises:
        ConfigError: `output` is one of the folders, so that a second run would read the pictures of the first.
    """
    files: list[Path] = []
    short: list[Path] = []
    missing: dict[str, str] = {}
    for item in items:
        text, start = str(item), Path(item)
        if start.is_dir():
            if start.resolve() == output.resolve():
                raise ConfigError(f"--output {output} is also a folder of images; write the results to a different one")
            found = list(_walk(start, output.resolve()))
            reason = f"has no image and no video ({', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))})"
        elif start.is_file():
            found, start, reason = [start], start.parent, ""
        elif glob.has_magic(text):
            matches = map(Path, sorted(glob.glob(text, recursive=True)))
            found = [file for file in matches if file.is_file() and _is_input(file.name)]
            fixed = text[: min(text.index(sign) for sign in "*?[" if sign in text)]
            start = Path(os.path.dirname(fixed))
            reason = "no image and no video matches the pattern"
        else:
            found, reason = [], "does not exist"
        if not found:
            missing[text] = reason
        files += found
        short += [file.relative_to(start) for file in found]
    names = _distinct_names(files, short, tasks)
    return [Input(file, name) for file, name in zip(files, names, strict=True)], missing


def results_of(name: str, tasks: Sequence[str]) -> list[str]:
    """Return the files that hold the results of an input, relative to the output folder: JSON, a picture per task."""
    return [f"{name}.json", *(f"{name}-{task.replace('/', '%2F')}.png" for task in tasks)]


def _is_input(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not name.startswith(".")


def _walk(folder: Path, output: Path) -> Iterator[Path]:
    """Yield the images and videos below a folder, each folder once even if links lead to it again."""
    entered = {output, folder.resolve()}
    for current, folders, names in os.walk(folder, followlinks=True):
        inner = {name: Path(current, name).resolve() for name in sorted(folders) if not name.startswith(".")}
        folders[:] = []
        for name, target in inner.items():
            if target not in entered:
                entered.add(target)
                folders.append(name)
        yield from (Path(current, name) for name in sorted(names) if _is_input(name))


def _distinct_names(files: Sequence[Path], short: Sequence[Path], tasks: Sequence[str]) -> list[str]:
    """Return the name of each file's results; the results of no two inputs are the same file.

    Args:
        files: the files.
        short: how each is called if that is unique; its suffix is left out.
        tasks: names of the tasks.
    """
    names = [path.with_suffix("").as_posix() for path in short]
    for with_suffix in (False, True):
        owners: dict[str, set[Path]] = {}
        for file, name in zip(files, names, strict=True):
            for result in results_of(name, tasks):
                owners.setdefault(result.casefold(), set()).add(file.resolve())
        clashing = [
            i for i, name in enumerate(names) if any(len(owners[r.casefold()]) > 1 for r in results_of(name, tasks))
        ]
        if clashing:
            common = os.path.commonpath([files[i].absolute().parent for i in clashing])
            for i in clashing:
                longer = files[i].absolute().relative_to(common)
                names[i] = (longer if with_suffix else longer.with_suffix("")).as_posix()
    taken: set[str] = set()
    for i, name in enumerate(names):  # what is left is the same file, given more than once
        number = 1
        while not taken.isdisjoint(results := {r.casefold() for r in results_of(names[i], tasks)}):
            number += 1
            names[i] = f"{name}-{number}"
        taken |= results
    return names


def grouped(inputs: Sequence[Input], size: int) -> Iterator[list[Input]]:
    """Yield the inputs in their order: images in groups of up to `size`, every video alone."""
    group: list[Input] = []
    for item in inputs:
        if group and (is_video(item.file) or len(group) == size):
            yield group
            group = []
        if is_video(item.file):
            yield [item]
        else:
            group.append(item)
    if group:
        yield group
