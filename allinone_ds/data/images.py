"""Files to pixels: images become upright uint8 RGB, label maps become class ids; and which files a folder
holds."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.io
from PIL import Image, ImageOps
from torchvision import tv_tensors

from allinone_ds.data.base import Problem
from allinone_ds.errors import BrokenSample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
MISSING = "file is missing; restore it or remove the entry"

_EXIF_ORIENTATION = 0x0112
# torchvision decodes jpeg twice as fast as PIL. Only jpeg: a png with a damaged data block makes torchvision
# (seen in 0.29.2) crash the whole process instead of raising.
_JPEG = b"\xff\xd8\xff"


def read_image(path: str, data: bytes | None = None) -> tv_tensors.Image:
    """Reads any picture as upright 8-bit RGB.

    EXIF orientation is applied. Grey and palette pictures become RGB, alpha is dropped, CMYK is converted. Of
    16-bit channels the upper 8 bits are kept (full scale stays full scale).

    Args:
        path: the file, also what a `BrokenSample` names.
        data: the file's bytes, when they come from elsewhere.

    Returns:
        uint8 (3, H, W)

    Raises:
        BrokenSample: missing, truncated, not a picture, or of floating-point pixels.
    """
    data = _bytes(path) if data is None else data
    if data.startswith(_JPEG):
        try:
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            mode = torchvision.io.ImageReadMode.RGB
            return tv_tensors.Image(torchvision.io.decode_jpeg(raw, mode, apply_exif_orientation=True))  # (3, H, W)
        except RuntimeError:
            pass  # a kind that only PIL knows, or broken: PIL says what is wrong
    try:
        with Image.open(io.BytesIO(data)) as picture:
            array = to_rgb(ImageOps.exif_transpose(picture))  # (H, W, 3)
    except Exception as error:  # decoders raise almost anything on broken files
        raise BrokenSample(path, _why(error)) from None
    return tv_tensors.Image(torch.from_numpy(array).permute(2, 0, 1))


def read_label_map(path: str, data: bytes | None = None) -> np.ndarray:
    """Reads a label map: the stored numbers (of a palette png: the palette places), not its colours.

    Returns:
        integers (H, W), uint8 or wider

    Raises:
        BrokenSample: missing, truncated, or with more than one channel.
    """
    data = _bytes(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            mode, array = picture.mode, np.array(picture)
    except Exception as error:  # decoders raise almost anything on broken files
        raise BrokenSample(path, _why(error)) from None
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise BrokenSample(
            path,
            f"is a picture of mode {mode}; a label map has one channel of class ids (png of mode L, P or I;16)",
        )
    return array.astype(np.uint8) if array.dtype == bool else array


def image_size(path: str) -> tuple[int, int] | None:
    """(H, W) of the upright picture, from the file's header alone; None when it cannot be read."""
    try:
        with Image.open(path) as file:
            picture: Image.Image = file
            if file.format == "TIFF":  # whose `size` is upright before or after loading, as Pillow's release has it
                picture = ImageOps.exif_transpose(picture)
            width, height = picture.size
            turned = picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # decoders raise almost anything on broken files
        return None
    return (width, height) if turned else (height, width)


def compare_files(root: Path, wanted: Sequence[str]) -> list[Problem]:
    """Compares the files that annotations name with those on disk; lists folders once instead of asking file
    by file.

    Args:
        root: folder that `wanted` is relative to.
        wanted: file names, with sub-folders where there are any.

    Returns:
        An error for each missing file, a warning for names used twice, and one warning for pictures nobody
        names.
    """
    seen: dict[str, None] = {}  # a set that keeps the order
    found: list[Problem] = []
    for file in wanted:
        if file in seen:
            found.append(Problem(str(root / file), "is listed more than once; keep one entry", "warning"))
        seen[file] = None
    on_disk: set[str] = set()
    for folder in {os.path.dirname(file) for file in seen}:
        on_disk.update(os.path.join(folder, name) for name in list_files(root / folder))
    normal = {os.path.normpath(file) for file in seen}
    on_disk = {os.path.normpath(file) for file in on_disk}
    found += [Problem(str(root / f), MISSING) for f in seen if os.path.normpath(f) not in on_disk]
    return found + orphans(root, sorted(f for f in on_disk - normal if is_image(f)), "in no annotation")


def orphans(root: Path, files: Sequence[str], what: str) -> list[Problem]:
    """One warning that pictures below `root` are left unused, or nothing."""
    if not files:
        return []
    shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return [Problem(str(root), f"pictures {what}, not used: {len(files)} ({shown})", "warning")]


def list_files(folder: Path) -> list[str]:
    """Names of the files in a folder (none when there is no such folder)."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file()]
    except OSError:
        return []


def walk_images(folder: Path) -> list[str]:
    """Every picture below a folder, sorted, relative to it; what is hidden (.ipynb_checkpoints) is left out."""
    found = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(here, name), folder) for name in names if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file name ends like a picture's and is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BrokenSample(path, MISSING) from None
    except OSError as error:
        raise BrokenSample(path, f"cannot be opened: {error.strerror or error}") from None


def _why(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not a picture, or its header is damaged; replace the file"
    return f"cannot be decoded: {error}; replace the file"


def to_rgb(picture: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an opened picture, as it lies.

    Raises:
        ValueError: floating-point pixels, or of more than 16 bit, or of 16 bit that would all be black.
    """
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers; convert the picture to 8 or 16 bit")
    if picture.mode.startswith("I"):
        wide = np.array(picture).astype(np.int64)  # 16-bit grey, in Pillow also as 32-bit "I"
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("pixels need more than 16 bit; convert the picture to 8 or 16 bit")
        if 0 < wide.max() < 256:
            raise ValueError("pixels are of 16 bit, their upper 8 all 0, so it would be black; convert it to 8 bit")
        grey = (wide >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))
