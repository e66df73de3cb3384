"""From files to pixels: images become upright uint8 RGB, label maps become class ids."""

from __future__ import annotations

import io

import numpy as np
import torch
import torchvision.io
from PIL import Image, ImageOps
from torchvision import tv_tensors

from allinone_ds.errors import BrokenSample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
MISSING_FILE = "file is missing; restore it or remove the entry"

_EXIF_ORIENTATION = 0x0112
# torchvision decodes jpeg twice as fast as Pillow. It decodes nothing else here: on a png with a damaged data block,
# torchvision 0.29.2 crashes the process instead of raising.
_JPEG = b"\xff\xd8\xff"


def read_image(path: str, data: bytes | None = None) -> tv_tensors.Image:
    """Read an image as upright 8-bit RGB.

    EXIF orientation is applied. Grey and palette images become RGB, alpha is dropped, CMYK is converted. 16-bit
    channels keep their upper 8 bits, so that full scale stays full scale.

    Args:
        path: the file that is read, and that a `BrokenSample` names.
        data: the content of the file, if it comes from elsewhere.

    Returns:
        uint8 (3, H, W)

    Raises:
        BrokenSample: the file is missing, truncated or not an image, or its pixels are floating-point numbers.

    Example:
        >>> read_image("tiny.ppm", b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255])).tolist()
        [[[255, 0]], [[0, 0]], [[0, 255]]]
    """
    data = _read_bytes(path) if data is None else data
    if data.startswith(_JPEG):
        try:
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            mode = torchvision.io.ImageReadMode.RGB
            return tv_tensors.Image(torchvision.io.decode_jpeg(raw, mode, apply_exif_orientation=True))  # (3, H, W)
        except RuntimeError:
            pass  # Pillow reads what torchvision cannot, or says what is wrong
    try:
        with Image.open(io.BytesIO(data)) as picture:
            array = to_rgb(ImageOps.exif_transpose(picture))  # (H, W, 3)
    except Exception as error:  # decoders raise many types of errors on broken files
        raise BrokenSample(path, _decoding_reason(error)) from None
    return tv_tensors.Image(torch.from_numpy(array).permute(2, 0, 1))


def read_label_map(path: str, data: bytes | None = None) -> np.ndarray:
    """Read the stored values of a label map; those of a palette png are its palette indices, not its colours.

    Args:
        path: the file that is read, and that a `BrokenSample` names.
        data: the content of the file, if it comes from elsewhere.

    Returns:
        integers (H, W), uint8 or wider

    Raises:
        BrokenSample: the file is missing or truncated, or has more than one channel.

    Example:
        >>> read_label_map("tiny.pgm", b"P5 3 1 255 " + bytes([0, 1, 255])).tolist()
        [[0, 1, 255]]
    """
    data = _read_bytes(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            mode, array = picture.mode, np.array(picture)
    except Exception as error:  # decoders raise many types of errors on broken files
        raise BrokenSample(path, _decoding_reason(error)) from None
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise BrokenSample(
            path,
            f"is an image of mode {mode}; a label map has one channel of class ids (png of mode L, P or I;16)",
        )
    return array.astype(np.uint8) if array.dtype == bool else array


def image_size(path: str) -> tuple[int, int] | None:
    """Return (H, W) of the upright image from the header of its file, or None if it cannot be read."""
    try:
        with Image.open(path) as file:
            picture: Image.Image = file
            if file.format == "TIFF":  # Pillow's releases differ in whether its `size` is upright before loading
                picture = ImageOps.exif_transpose(picture)
            width, height = picture.size
            turned = picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # decoders raise many types of errors on broken files
        return None
    return (width, height) if turned else (height, width)


def _read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BrokenSample(path, MISSING_FILE) from None
    except OSError as error:
        raise BrokenSample(path, f"cannot be opened: {error.strerror or error}") from None


def _decoding_reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not an image, or its header is damaged; replace the file"
    return f"cannot be decoded: {error}; replace the file"


def to_rgb(picture: Image.Image) -> np.ndarray:
    """Return the pixels of an opened image, uint8 (H, W, 3), without applying its orientation.

    Raises:
        ValueError: the pixels are floating-point numbers, exceed 16 bit, or have 16 bit of which the upper 8 are 0.
    """
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers; convert the image to 8 or 16 bit")
    if picture.mode.startswith("I"):
        wide = np.array(picture).astype(np.int64)  # (H, W); Pillow opens some 16-bit grey images as 32-bit "I"
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("pixels exceed 16 bit; convert the image to 8 or 16 bit")
        if 0 < wide.max() < 256:
            raise ValueError(
                "pixels have 16 bit, of which the upper 8 are 0: the image would be black; convert it to 8 bit"
            )
        grey = (wide >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))
