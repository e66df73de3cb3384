"""Frames of a video file, and a video of drawn frames, through PyAV (the extra `video`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from allinone_ds.errors import BrokenSample, ConfigError

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts"})
_DEFAULT_RATE = Fraction(25)
"""Frames per second of a video whose file does not say them."""


class Frame(NamedTuple):
    """One frame of a video, as `read_frames` yields it.

    Example:
        >>> Frame(torch.zeros(3, 48, 64, dtype=torch.uint8), number=0, seconds=0.0).image.shape
        torch.Size([3, 48, 64])
    """

    image: Tensor
    """uint8 RGB (3, H, W), upright."""
    number: int
    """Number of the frame, from 0."""
    seconds: float
    """Time of the frame in the video."""


def need_av() -> None:
    """Check that PyAV is installed.

    Raises:
        ConfigError: names the command that installs it.
    """
    if importlib.util.find_spec("av") is None:
        raise ConfigError("videos need the package av: pip install 'allinone_ds[video]'")


def check_every(every: int) -> None:
    """Check that each `every`-th frame of a video can be taken.

    Raises:
        ConfigError: the number is below 1.
    """
    if every < 1:
        raise ConfigError(f"every = {every}: give 1 for all frames of a video, 5 for each fifth one")


def read_frames(file: Path, every: int = 1) -> Iterator[Frame]:
    """Yield the frames of a video one after the other.

    Args:
        file: the video.
        every: yield only each `every`-th frame, from the first on.

    Raises:
        BrokenSample: the file is not a video, or is damaged.
        ConfigError: PyAV is not installed.
    """
    need_av()
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise BrokenSample(str(file), "has no pictures, only sound; give a different file")
            stream = container.streams.video[0]
            rate = stream.average_rate or _DEFAULT_RATE
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                if number % every:
                    continue
                # a phone stores how it was held; PyAV gives the angle, counter-clockwise
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                image = torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)
                seconds = float(number / rate) if frame.time is None else frame.time
                yield Frame(image, number, round(seconds, 3))
    except (av.FFmpegError, OSError) as error:
        raise BrokenSample(str(file), f"cannot be decoded as a video: {error}; replace the file") from error
    if number < 0:
        raise BrokenSample(str(file), "holds no frame; replace the file")


def frame_rate(file: Path) -> Fraction:
    """Return the frames per second of a video, 25 if its file does not say them.

    Raises:
        BrokenSample: the file is not a video.
        ConfigError: PyAV is not installed.
    """
    need_av()
    import av

    try:
        with av.open(str(file)) as container:
            found = container.streams.video[0].average_rate if container.streams.video else None
            return found or _DEFAULT_RATE
    except (av.FFmpegError, OSError) as error:
        raise BrokenSample(str(file), f"cannot be decoded as a video: {error}; replace the file") from error


class VideoWriter:
    """Writes drawn frames as a video; all get the size of the first, scaled and padded with white where they differ.

    Args:
        target: the file to write, .mp4.
        rate: frames per second.

    Example::

        with VideoWriter(Path("drawn.mp4"), Fraction(25)) as writer:
            writer.add(Image.new("RGB", (64, 48)))
    """

    def __init__(self, target: Path, rate: Fraction) -> None:
        need_av()
        import av

        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._container = cast(Any, av.open(str(target), "w"))
        self._stream: Any = self._container.add_stream(codec, rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def add(self, image: Image.Image) -> None:
        """Append a frame."""
        import av

        if self._size is None:
            self._size = image.width + image.width % 2, image.height + image.height % 2  # yuv420p needs even sides
            self._stream.width, self._stream.height = self._size
        if image.size != self._size:
            image = ImageOps.pad(image, self._size, color="white")
        for packet in self._stream.encode(av.VideoFrame.from_image(image)):
            self._container.mux(packet)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._size is not None:
            for packet in self._stream.encode():
                self._container.mux(packet)
        self._container.close()
