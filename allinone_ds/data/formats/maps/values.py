"""From the numbers that a file or a cell stores to the target of a sample: depth, normals, edges or saliency."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torchvision import tv_tensors

from allinone_ds.data.base import IGNORE
from allinone_ds.data.dense_maps import DenseMap, EdgeMap, NormalMap
from allinone_ds.errors import BrokenSample, ConfigError
from allinone_ds.strict import Strict

DENSE_KINDS = ("depth", "normals", "edges", "saliency")
"""Kinds of data with a map of values as target, which a sample has under the name of the kind."""
BINARY_KINDS = ("edges", "saliency")
"""Kinds whose maps say yes or no of each pixel."""
_SHORTEST, _LONGEST = 0.9, 1.1  # length of a stored normal, which quantisation and interpolation change
_WRONG = 0.5  # fraction of the vectors of another length, above which they are no normals


class MapValues(Strict):
    """How the stored numbers of a map are read. Formats with such targets have these keys.

    Example:
        >>> MapValues(scale=0.001, maximum=10.0).invalid is None
        True
    """

    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Depth: what a stored number is multiplied by. With 0.001, millimetres become metres."""
    offset: float = Field(default=0.0, allow_inf_nan=False)
    """Depth: what is added to a stored number before it is multiplied; -1 for the disparities of Cityscapes."""
    invalid: Annotated[list[float] | None, BeforeValidator(lambda v: [v] if isinstance(v, int | float) else v)] = None
    """Stored numbers of the pixels without a value (of normals: in all three channels); null: 0 for depth and normals,
    none for edges and saliency. NaN and infinity never are values."""
    minimum: float | None = None
    """Depth: smaller values, after scaling, count as pixels without a value."""
    maximum: float | None = None
    """Depth: larger values, after scaling, count as pixels without a value."""
    stored_range: tuple[float, float] | None = None
    """Normals: the stored numbers that stand for -1 and 1; null: 0 and 255 in files of 8 bits, 0 and 65535 in files of
    16 bits, -1 and 1 for floating-point numbers."""
    negate: list[Literal["x", "y", "z"]] = []
    """Normals: the axes whose sign is changed, so that x points to the right, y down and z towards the viewer."""
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    """Edges and saliency: pixels with a larger stored number are edges, or salient, for example 127 in grey maps of 0
    to 255. null: all but 0; maps with more than one other number are then an error."""

    def refuse_unused(self, kind: str) -> None:
        """Refuse options of other kinds, which would change nothing.

        Raises:
            ConfigError: names the option and the kinds it is for.
        """
        for option, kinds in _KINDS_OF.items():
            if kind not in kinds and getattr(self, option) != MapValues.model_fields[option].default:
                raise ConfigError(f"{option} is an option of {' and '.join(kinds)}, the kind is {kind}; remove it")
        if self.minimum is not None and self.maximum is not None and not self.minimum < self.maximum:
            raise ConfigError(f"minimum = {self.minimum:g}, maximum = {self.maximum:g}: the minimum must be smaller")
        if self.stored_range is not None and self.stored_range[0] == self.stored_range[1]:
            raise ConfigError(f"stored_range = {list(self.stored_range)}: give two different numbers")


_KINDS_OF = {
    "scale": ("depth",),
    "offset": ("depth",),
    "minimum": ("depth",),
    "maximum": ("depth",),
    "invalid": DENSE_KINDS,
    "stored_range": ("normals",),
    "negate": ("normals",),
    "threshold": BINARY_KINDS,
}


def read_values(stored: np.ndarray, kind: str, options: MapValues, path: str) -> np.ndarray:
    """Return the target in stored numbers.

    Args:
        stored: (H, W) or (H, W, C) as the file stores it; (C, H, W) for floating-point numbers.
        kind: one of `DENSE_KINDS`.
        options: how to read the numbers.
        path: the file that errors name.

    Returns:
        Depth: float32 (H, W), NaN without a value. Normals: float32 (3, H, W) of length 1, NaN without a value. Edges
        and saliency: uint8 (H, W): 0, 1, or 255 without a value.

    Raises:
        BrokenSample: wrong number of channels, negative depths, vectors that are no normals, or numbers of a wrong
            type.
    """
    if stored.dtype.kind not in "biuf":
        raise BrokenSample(path, f"holds {stored.dtype}, no numbers; write one real number per pixel and channel")
    channels = 3 if kind == "normals" else 1
    planes = _channels_first(stored, channels)
    if planes is None:
        shape = " x ".join(map(str, stored.shape))
        needed = "three channels (x, y, z)" if channels == 3 else "one channel"
        raise BrokenSample(path, f"has the shape {shape}; {kind} needs {needed} per pixel; convert the file")
    default = [] if kind in BINARY_KINDS else [0.0]
    listed = default if options.invalid is None else options.invalid
    values = planes.astype(np.float32)
    unknown = np.asarray(~np.isfinite(values).all(axis=0))  # (H, W)
    for number in listed:
        unknown = unknown | (planes == number).all(axis=0)
    if kind in BINARY_KINDS:
        return _binary(values[0], unknown, options.threshold, path)
    if kind == "depth":
        return _depth(values[0], unknown, options, path)
    return _normals(values, unknown, options, stored.dtype, path)


def _channels_first(stored: np.ndarray, channels: int) -> np.ndarray | None:
    """Return numbers (C, H, W); None if there are not `channels` of them."""
    if stored.ndim == 2 and channels == 1:
        return stored[None]
    if stored.ndim == 3 and stored.shape[-1] == channels:
        return np.moveaxis(stored, -1, 0)
    if stored.ndim == 3 and stored.shape[0] == channels:
        return stored
    return None


def _binary(values: np.ndarray, unknown: np.ndarray, threshold: float | None, path: str) -> np.ndarray:
    positive = values[(values > 0) & ~unknown]
    if threshold is None and positive.size and positive.min() != positive.max():
        raise BrokenSample(
            path,
            f"holds several numbers above 0, from {positive.min():g} to {positive.max():g}; set 'threshold': pixels "
            "with a larger number count",
        )
    return np.where(unknown, IGNORE, values > (threshold or 0)).astype(np.uint8)


def _depth(values: np.ndarray, unknown: np.ndarray, options: MapValues, path: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        depth = (values + np.float32(options.offset)) * np.float32(options.scale)
        if options.minimum is not None:
            unknown |= depth < options.minimum
        if options.maximum is not None:
            unknown |= depth > options.maximum
        wrong = (depth <= 0) & ~unknown
    if wrong.any():
        raise BrokenSample(
            path,
            f"holds {depth[wrong][0]:g} in {int(wrong.sum())} pixels; a depth is above 0; list the stored number in "
            "'invalid', or set 'minimum'",
        )
    depth[unknown] = np.nan
    return depth


def _normals(values: np.ndarray, unknown: np.ndarray, options: MapValues, dtype: np.dtype, path: str) -> np.ndarray:
    low, high = options.stored_range or ((0.0, float(np.iinfo(dtype).max)) if dtype.kind == "u" else (-1.0, 1.0))
    vectors = (values - low) * (2 / (high - low)) - 1  # (3, H, W)
    for axis in options.negate:
        vectors["xyz".index(axis)] *= -1
    length = np.sqrt(np.square(vectors).sum(axis=0))
    unknown |= ~(length > 0.5)  # no direction: a vector of zeros, which interpolation shortens further
    off = ((length < _SHORTEST) | (length > _LONGEST)) & ~unknown
    known = int((~unknown).sum())
    if known and off.sum() > _WRONG * known:
        median = float(np.median(length[~unknown]))
        least, most = float(values[:, ~unknown].min()), float(values[:, ~unknown].max())
        raise BrokenSample(
            path,
            f"has vectors of length {median:.3g} (median) with {low:g} as -1 and {high:g} as 1; a normal has length 1; "
            f"the numbers lie in {least:.3g}..{most:.3g}; set 'stored_range' to the stored numbers of -1 and 1",
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        vectors /= length
    vectors[:, unknown] = np.nan
    return vectors.astype(np.float32)


def as_target(values: np.ndarray, kind: str) -> tv_tensors.Mask:
    """Return what `read_values` returned in the class that moves with the pixels."""
    cls = {"depth": DenseMap, "normals": NormalMap, "edges": EdgeMap, "saliency": tv_tensors.Mask}[kind]
    return cls(torch.from_numpy(np.ascontiguousarray(values)))
