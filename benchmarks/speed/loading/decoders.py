"""Milliseconds of decoders of JPEG, alone and with the resize to the size of a network's input."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

Decoder = Callable[[bytes, int], torch.Tensor]
"""Content of a file and side of the network's input in pixels -> uint8 (3, H, W)."""


def _pillow(data: bytes, side: int) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def _pillow_draft(data: bytes, side: int) -> torch.Tensor:
    picture = Image.open(io.BytesIO(data))
    picture.draft("RGB", (side, side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _decode_jpeg(data: bytes, side: int) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_jpeg(raw, ImageReadMode.RGB, apply_exif_orientation=True)


def _decode_image(data: bytes, side: int) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_image

    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_image(raw, ImageReadMode.RGB, apply_exif_orientation=True)


def _read_image(data: bytes, side: int) -> torch.Tensor:
    from allinone_ds.data.images import read_image

    return read_image("photo.jpg", data).as_subclass(torch.Tensor)


def decoders() -> dict[str, Decoder]:
    """Return name -> decoder of those that are installed."""
    found: dict[str, Decoder] = {
        "Pillow": _pillow,
        "Pillow, draft mode": _pillow_draft,
        "torchvision decode_jpeg": _decode_jpeg,
        "torchvision decode_image": _decode_image,
        "this package, read_image": _read_image,
    }
    try:
        import turbojpeg

        turbo = turbojpeg.TurboJPEG()
    except (ImportError, RuntimeError, OSError) as error:
        print(f"PyTurboJPEG is left out: {error}")
    else:
        rgb = {"pixel_format": turbojpeg.TJPF_RGB}

        def scaled(data: bytes, side: int) -> torch.Tensor:
            height, width = turbo.decode_header(data)[1::-1]
            fitting = [f for f in turbo.scaling_factors if min(height, width) * f[0] >= side * f[1]]
            factor = min(fitting, key=lambda f: f[0] / f[1], default=(1, 1))
            decoded = turbo.decode(data, scaling_factor=min(factor, (1, 1), key=lambda f: f[0] / f[1]), **rgb)
            return torch.from_numpy(decoded).permute(2, 0, 1)

        found["PyTurboJPEG"] = lambda data, side: torch.from_numpy(turbo.decode(data, **rgb)).permute(2, 0, 1)
        found["PyTurboJPEG, scaled"] = scaled
    try:
        import cv2
    except ImportError:
        print("OpenCV is left out: it is not installed")
    else:
        cv2.setNumThreads(1)
        flags = cv2.IMREAD_COLOR_RGB if hasattr(cv2, "IMREAD_COLOR_RGB") else cv2.IMREAD_COLOR
        found["OpenCV"] = lambda data, side: torch.from_numpy(
            cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        ).permute(2, 0, 1)
    return found


def measure_decoder(decode: Decoder, images: list[bytes], side: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds per image of a processor, and the difference of the pixels from those of Pillow.

    Args:
        decode: the decoder.
        images: files of one size.
        side: pixels of the square that they are resized to.
        rounds: number of times that all of them are decoded; the fastest counts.
    """
    from torchvision.transforms.v2 import functional

    alone, resized = [], []
    for _ in range(rounds):
        for times, resize in ((alone, False), (resized, True)):
            start = time.process_time()
            for data in images:
                pixels = decode(data, side)
                if resize:
                    functional.resize(pixels, [side, side], antialias=True)
            times.append((time.process_time() - start) * 1000 / len(images))
    pixels, expected = decode(images[0], side), _pillow(images[0], side)
    difference = (pixels.int() - expected.int()).abs() if pixels.shape == expected.shape else None
    return {
        "decode_ms": min(alone),
        "with_resize_ms": min(resized),
        "mean_difference": None if difference is None else float(difference.float().mean()),
        "largest_difference": None if difference is None else int(difference.max()),
    }
