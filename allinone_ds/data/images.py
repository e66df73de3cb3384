"""From files to pixels: images become upright uint8 RGB, label maps become class ids."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torchvision.io
from PIL import Image, ImageOps
from torchvision import tv_tensors

from allinone_ds.errors import BrokenSample

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .jp2 .j2k .png .apng .bmp .dib .webp .avif .tif .tiff .gif .ppm .pgm .pbm .pnm .tga"
    ).split()
)
"""Suffixes of the files that are read as images wherever a folder is searched."""
MISSING_FILE = "file is missing; restore it or remove the entry"

_EXIF_ORIENTATION = 0x0112
# torchvision decodes jpeg twice as fast as Pillow. Beside it, only png files of 16-bit colours that Pillow has decoded:
# on a png with a damaged data block, torchvision 0.29.2 crashes the process instead of raising.
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_NUMPY = b"\x93NUMPY"

_decoded: ContextVar[dict[Any, tv_tensors.Image] | None] = ContextVar("decoded", default=None)


@contextlib.contextmanager
def decoded_once() -> Iterator[None]:
    """Decode each image file once inside this block, whoever reads it; the readers get the same tensor."""
    known = _decoded.get()
    token = _decoded.set({} if known is None else known)
    try:
        yield
    finally:
        _decoded.reset(token)


def read_image(path: str, data: bytes | None = None) -> tv_tensors.Image:
    """Read an image as upright 8-bit RGB.

    EXIF orientation is applied. Grey and palette images become RGB, alpha is dropped, CMYK is converted, and the first
    picture of an animation is used. `to_8_bit` describes what happens to pixels of more than 8 bits. A numpy file holds
    integers, or floats in 0..1: (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels.

    Args:
        path: the file that is read, and that a `BrokenSample` names.
        data: the content of the file, if it comes from elsewhere.

    Returns:
        uint8 (3, H, W)

    Raises:
        BrokenSample: the file is missing, truncated or not an image, or its pixels cannot become 8 bits.

    Example:
        >>> read_image("tiny.ppm", b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255])).tolist()
        [[[255, 0]], [[0, 0]], [[0, 255]]]
    """
    known = _decoded.get()
    if known is None:
        return _read_image(path, data)
    key = path, data
    if key not in known:
        known[key] = _read_image(path, data)
    return known[key]


def _read_image(path: str, data: bytes | None) -> tv_tensors.Image:
    data = _read_bytes(path) if data is None else data
    if data.startswith(_JPEG):
        try:
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            mode = torchvision.io.ImageReadMode.RGB
            return tv_tensors.Image(torchvision.io.decode_jpeg(raw, mode, apply_exif_orientation=True))  # (3, H, W)
        except RuntimeError:
            pass  # Pillow reads what torchvision cannot, or says what is wrong
    try:
        array = to_8_bit(_numpy_pixels(data) if data.startswith(_NUMPY) else _decode(data))  # (H, W, 3)
    except Exception as error:  # decoders raise many types of errors on broken files
        raise BrokenSample(path, _decoding_reason(error)) from None
    return tv_tensors.Image(torch.from_numpy(array).permute(2, 0, 1))


def stored_bits(data: bytes) -> int | None:
    """Return the bits that the pixels of a 16-bit image use (see `to_8_bit`), or None for any other content.

    Args:
        data: content of a file.
    """
    if data.startswith(_JPEG):
        return None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if not (picture.mode.startswith("I") or _is_wide_colour(picture, data)):
                return None
        array = _decode(data)
    except Exception:  # whoever reads the pixels reports what is wrong
        return None
    return bits_of(int(array.max())) if array.dtype != np.uint8 else None


def read_label_map(path: str, data: bytes | None = None) -> np.ndarray:
    """Read the stored values of a label map; those of a palette png are its palette indices, not its colours.

    A numpy file may hold its class ids as floats.

    Args:
        path: the file that is read, and that a `BrokenSample` names.
        data: the content of the file, if it comes from elsewhere.

    Returns:
        integers (H, W), uint8 or wider

    Raises:
        BrokenSample: the file is missing or truncated, has more than one channel, or holds a number that is not whole.

    Example:
        >>> read_label_map("tiny.pgm", b"P5 3 1 255 " + bytes([0, 1, 255])).tolist()
        [[0, 1, 255]]
    """
    data = _read_bytes(path) if data is None else data
    if data.startswith(_NUMPY):
        return _whole_numbers(path, read_map(path, data))
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            mode, array = picture.mode, np.array(picture)
    except Exception as error:  # decoders raise many types of errors on broken files
        raise BrokenSample(path, _decoding_reason(error)) from None
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise BrokenSample(
            path,
            f"is an image of mode {mode}; a label map has one channel of class ids (png of mode L, P or I;16); if its "
            "colours are the classes, list them in class_colors",
        )
    return array.astype(np.uint8) if array.dtype == bool else array


def _whole_numbers(path: str, stored: np.ndarray) -> np.ndarray:
    """Return the class ids (H, W) that a numpy file stores, of any type of numbers."""
    planes = stored[..., 0] if stored.ndim == 3 and stored.shape[-1] == 1 else stored
    planes = planes[0] if planes.ndim == 3 and planes.shape[0] == 1 else planes
    if planes.ndim != 2 or planes.dtype.kind not in "biuf":
        shape = " x ".join(map(str, stored.shape))
        raise BrokenSample(path, f"holds {stored.dtype} of shape {shape}; a label map has one class id per pixel")
    if planes.dtype.kind != "f":
        return planes.astype(np.uint8) if planes.dtype == bool else planes
    wrong = planes[~(np.isfinite(planes) & (planes == np.rint(planes)))]
    if wrong.size:
        raise BrokenSample(path, f"holds {wrong[0]:g} in {wrong.size} pixels; class ids are whole numbers; correct it")
    return planes.astype(np.int64)


def read_color_map(path: str, data: bytes | None = None) -> np.ndarray:
    """Read a label map whose colours are the classes; an alpha channel is left out.

    Args:
        path: the file that is read, and that a `BrokenSample` names.
        data: the content of the file, if it comes from elsewhere.

    Returns:
        int32 (H, W): red * 65536 + green * 256 + blue of each pixel

    Raises:
        BrokenSample: the file is missing or truncated, or its channels do not have 8 bits.
    """
    data = _read_bytes(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data)) as picture:
            values = _channels(picture)
            wide = values.dtype != np.uint8 or _is_wide_colour(picture, data)
    except Exception as error:  # decoders raise many types of errors on broken files
        raise BrokenSample(path, _decoding_reason(error)) from None
    if wide:
        raise BrokenSample(path, "has channels of more than 8 bits; a label map of colours has 8 bits per channel")
    red, green, blue = np.moveaxis(values.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def read_map(path: str, data: bytes | None = None) -> np.ndarray:
    """Read the stored numbers of a map of values: a numpy file, or a png or tiff file of 8, 16 or 32 bits.

    Args:
        path: the file that is read, and that a `BrokenSample` names.
        data: the content of the file, if it comes from elsewhere.

    Returns:
        (H, W), or (H, W, C) of several channels, in the type of the file; a numpy file as it is.

    Raises:
        BrokenSample: the file is missing, truncated, or neither an image nor a numpy array.

    Example:
        >>> read_map("tiny.pgm", b"P5 2 1 65535 " + bytes([1, 0, 0, 2])).tolist()
        [[256, 2]]
    """
    data = _read_bytes(path) if data is None else data
    try:
        if data.startswith(_NUMPY):
            return np.load(io.BytesIO(data), allow_pickle=False)
        with Image.open(io.BytesIO(data)) as picture:
            if _is_wide_colour(picture, data):
                return _decode(data)
            picture.load()
            array = np.array(picture)
    except Exception as error:  # decoders raise many types of errors on broken files
        raise BrokenSample(path, _decoding_reason(error)) from None
    return array.astype(np.uint8) if array.dtype == bool else array


def image_size(path: str | io.BytesIO) -> tuple[int, int] | None:
    """Return (H, W) of the upright image from the header of its file, or None if it cannot be read."""
    try:
        if isinstance(path, str) and path.lower().endswith(".npy"):
            return _channels_last(np.load(path, mmap_mode="r", allow_pickle=False)).shape[:2]
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
    except (OSError, ValueError) as error:  # ValueError: the name holds a zero byte
        raise BrokenSample(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None


def _decoding_reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not an image, or its header is damaged; replace the file"
    return f"cannot be decoded: {error}; replace the file"


def to_rgb(picture: Image.Image) -> np.ndarray:
    """Return the pixels of an opened image, uint8 (H, W, 3), without applying its orientation.

    Raises:
        ValueError: see `to_8_bit`.
    """
    return to_8_bit(_channels(picture))


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Return pixels of any depth as uint8.

    Cameras and scanners store 10, 12 or 14 bits in 16-bit files, which do not say how many. An image therefore has as
    many bits as its largest value needs: the smallest of 8, 10, 12, 14 and 16. Its upper 8 bits are kept. Floats in
    0..1 are multiplied by 255.

    Args:
        values: integers or floats of any shape, without an alpha channel.

    Returns:
        uint8 of the same shape

    Raises:
        ValueError: an integer is negative or exceeds 16 bits, or a float lies outside 0..1.

    Example:
        >>> to_8_bit(np.array([0, 16, 4095])), to_8_bit(np.array([0.0, 0.5, 1.0]))
        (array([  0,   1, 255], dtype=uint8), array([  0, 128, 255], dtype=uint8))
    """
    if values.dtype == np.uint8:
        return values
    least, largest = (values.min(), values.max()) if values.size else (0, 0)
    if np.issubdtype(values.dtype, np.floating):
        if not (least >= 0 and largest <= 1):  # also false for NaN
            raise ValueError(
                f"pixels are floating-point numbers in {least:g}..{largest:g}, allowed are 0..1; "
                "convert the image to 8 or 16 bit"
            )
        return np.rint(values * 255).astype(np.uint8)
    if least < 0 or largest > 65535:
        raise ValueError(
            f"pixels lie in {least}..{largest}, allowed are 0..65535 (16 bits); convert the image to 8 or 16 bit"
        )
    return (values >> (bits_of(int(largest)) - 8)).astype(np.uint8)


def bits_of(largest: int) -> int:
    """Return the smallest of 8, 10, 12, 14 and 16 bits that hold a value of 0..65535."""
    return next(bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits)


def is_turned(data: bytes) -> bool:
    """Return whether the EXIF orientation of an image changes its pixels, but not its height and width.

    Args:
        data: content of a file.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.getexif().get(_EXIF_ORIENTATION, 1) in (2, 3, 4)
    except Exception:  # whoever reads the pixels reports what is wrong
        return False


def _decode(data: bytes) -> np.ndarray:
    """Return the upright pixels (H, W, 3) of a file in the depth that it stores."""
    with Image.open(io.BytesIO(data)) as picture:
        colour = _is_wide_colour(picture, data)
        upright = _channels(ImageOps.exif_transpose(picture))  # decodes, and raises for a damaged file
    if not colour:
        return upright
    # Pillow keeps the upper byte of 16-bit colours only
    if data.startswith(_PNG):
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        unchanged = torchvision.io.ImageReadMode.UNCHANGED
        wide = torchvision.io.decode_png(raw, unchanged, apply_exif_orientation=True).permute(1, 2, 0).numpy()
        return np.ascontiguousarray(wide[..., :3] if wide.shape[2] > 2 else wide[..., [0, 0, 0]])
    with Image.open(io.BytesIO(data)) as picture:
        tiles: list[Any] = list(picture.tile)  # (codec, box, offset, (name of the stored pixels, ...)) of each part
        for number, (*place, (name, *more)) in enumerate(tiles):
            make = getattr(tiles[number], "_make", tuple)  # before release 11, Pillow had plain tuples
            tiles[number] = make((*place, (_other_order(name), *more)))
        picture.tile = tiles
        lower = _channels(ImageOps.exif_transpose(picture))
    return upright.astype(np.uint16) << 8 | lower


def _numpy_pixels(data: bytes) -> np.ndarray:
    """Return the pixels (H, W, 3) of a numpy file in the type that it stores."""
    pixels = _channels_last(np.load(io.BytesIO(data), allow_pickle=False))
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"holds {pixels.dtype}, an image holds integers, or floats in 0..1")
    return np.ascontiguousarray(pixels[..., :3] if pixels.shape[2] > 1 else pixels[..., [0, 0, 0]])


def _channels_last(stored: np.ndarray) -> np.ndarray:
    """Return an array of an image as (H, W, C)."""
    if stored.ndim == 2:
        return stored[..., None]
    if stored.ndim == 3 and stored.shape[-1] in (1, 3, 4):
        return stored
    if stored.ndim == 3 and stored.shape[0] in (1, 3, 4):
        return np.moveaxis(stored, 0, -1)
    shape = " x ".join(map(str, stored.shape))
    raise ValueError(f"has the shape {shape}, an image is (H, W), (H, W, 3) or (3, H, W)")


def _is_wide_colour(picture: Image.Image, data: bytes) -> bool:
    """Return whether a file has several channels of 16 bits."""
    if data.startswith(_PNG):
        return data[24] == 16 and data[25] != 0  # bit depth and colour type of its header
    return picture.format == "TIFF" and picture.mode in ("RGB", "RGBA", "RGBX") and 16 in picture.tag_v2.get(258, ())  # type: ignore[attr-defined]


def _other_order(rawmode: str) -> str:
    """Return Pillow's name of the same pixels with their bytes swapped, with which it keeps the lower byte."""
    name, _, order = rawmode.partition(";16")
    native = "L" if sys.byteorder == "little" else "B"
    return f"{name};16{'B' if (native if order == 'N' else order) == 'L' else 'L'}"


def _channels(picture: Image.Image) -> np.ndarray:
    """Return the pixels (H, W, 3) of an opened image: uint8, integers of more bits, or floats."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        grey = np.array(picture)  # (H, W)
        return np.stack([grey] * 3, axis=-1)
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))
