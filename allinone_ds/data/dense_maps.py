"""Targets with a value per pixel beside class ids: depth, surface normals and edges, which move with the pixels.

Each class is a `tv_tensors.Mask`, for which torchvision's transforms know what to do, and replaces the kernels that
would be wrong for its values. May import nothing of the package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


class DenseMap(tv_tensors.Mask):
    """One number per pixel, float32 (H, W), such as depth; NaN where there is no value.

    It is resized to the nearest pixel, since a mean of two depths on either side of an outline is the depth of nothing.
    Pixels that a transform uncovers become NaN. The values do not change: an enlarged image keeps its depths.

    Example:
        >>> F.horizontal_flip(DenseMap(torch.tensor([[1.0, 2.0]])))
        DenseMap([[2., 1.]])
    """


class NormalMap(DenseMap):
    """The surface normal of each pixel, float32 (3, H, W), of length 1: x right, y down, z towards the viewer.

    Flips negate x or y, rotations rotate them. Crops, resizes and shifts keep the vectors. Shears, perspectives and
    elastic transforms are refused: they would need a vector that depends on the depth.

    Example:
        >>> F.horizontal_flip(NormalMap(torch.tensor([0.6, 0.0, 0.8]).view(3, 1, 1))).flatten()
        tensor([-0.6000,  0.0000,  0.8000])
    """


class EdgeMap(tv_tensors.Mask):
    """Whether each pixel is an edge, uint8 (H, W): 0, 1, or 255 (ignore).

    A pixel of a reduced map is an edge if one of the pixels that it stands for is. To the nearest pixel, an edge of one
    pixel's width would lose most of its pixels.

    Example:
        >>> F.resize(EdgeMap(torch.tensor([[0, 1, 0, 0]] * 4, dtype=torch.uint8)), [2, 2])
        EdgeMap([[1, 0],
                 [1, 0]], dtype=torch.uint8)
    """


EMPTY: dict[type[tv_tensors.TVTensor], float] = {
    tv_tensors.Mask: 255,
    EdgeMap: 255,
    DenseMap: math.nan,
    NormalMap: math.nan,
}
"""Value of the pixels that a transform uncovers, by class. torchvision compares classes, not subclasses."""


def empty_value(inpt: tv_tensors.TVTensor, otherwise: float) -> float:
    """Return the value of the pixels that a transform uncovers in a target, or `otherwise` for an image."""
    return next((EMPTY[cls] for cls in type(inpt).__mro__ if cls in EMPTY), otherwise)


@F.register_kernel(F.resize, DenseMap)
def _resize(inpt: DenseMap, size: Any, interpolation: Any = None, max_size: Any = None, **_: Any) -> DenseMap:
    return tv_tensors.wrap(_nearest(inpt.as_subclass(Tensor), size, max_size), like=inpt)


@F.register_kernel(F.resize, EdgeMap)
def _resize_edges(inpt: EdgeMap, size: Any, interpolation: Any = None, max_size: Any = None, **_: Any) -> EdgeMap:
    plain = inpt.as_subclass(Tensor)
    exact = _nearest(plain, size, max_size)
    if any(new < old for new, old in zip(exact.shape[-2:], plain.shape[-2:], strict=True)):
        edges = (plain == 1).float().reshape(-1, 1, *plain.shape[-2:])
        exact[functional.adaptive_max_pool2d(edges, exact.shape[-2:]).reshape(exact.shape) > 0] = 1
    return tv_tensors.wrap(exact, like=inpt)


def _nearest(values: Tensor, size: Any, max_size: Any) -> Tensor:
    """Return the values at the centres of the pixels of the resized image; torchvision 0.26 has it for images only."""
    exact = InterpolationMode.NEAREST_EXACT
    resized = F.resize_image(values.reshape(-1, *values.shape[-2:]), size, exact, max_size)
    return resized.reshape(*values.shape[:-2], *resized.shape[-2:])


@F.register_kernel(F.resized_crop, DenseMap)
@F.register_kernel(F.resized_crop, EdgeMap)
def _resized_crop(inpt: Any, top: int, left: int, height: int, width: int, size: Any, **_: Any) -> Any:
    return F.resize(F.crop(inpt, top, left, height, width), size)


@F.register_kernel(F.horizontal_flip, NormalMap)
def _flip_x(inpt: NormalMap) -> NormalMap:
    return tv_tensors.wrap(F.horizontal_flip_mask(_scaled(inpt, (-1, 1, 1))), like=inpt)


@F.register_kernel(F.vertical_flip, NormalMap)
def _flip_y(inpt: NormalMap) -> NormalMap:
    return tv_tensors.wrap(F.vertical_flip_mask(_scaled(inpt, (1, -1, 1))), like=inpt)


@F.register_kernel(F.rotate, NormalMap)
def _rotate(
    inpt: NormalMap,
    angle: float,
    interpolation: Any = None,
    expand: bool = False,
    center: Any = None,
    fill: Any = None,
    **_: Any,
) -> NormalMap:
    turned = _turned(inpt, -angle)  # torchvision rotates counter-clockwise here, and clockwise in `affine`
    return tv_tensors.wrap(F.rotate_mask(turned, angle, expand, center, fill), like=inpt)


@F.register_kernel(F.affine, NormalMap)
def _affine(
    inpt: NormalMap,
    angle: float,
    translate: Any,
    scale: float,
    shear: Any,
    interpolation: Any = None,
    fill: Any = None,
    center: Any = None,
    **_: Any,
) -> NormalMap:
    if any(shear):
        raise TypeError("surface normals cannot be sheared; remove the shear")
    moved = F.affine_mask(_turned(inpt, angle), angle, translate, scale, [0.0, 0.0], fill, center)
    return tv_tensors.wrap(moved, like=inpt)


@F.register_kernel(F.pad, NormalMap)
def _pad(inpt: NormalMap, padding: Any, fill: Any = None, padding_mode: str = "constant", **_: Any) -> NormalMap:
    """Pad with NaN wherever torchvision would repeat or mirror pixels: the normals of a mirror image are others."""
    value = math.nan if fill is None or padding_mode != "constant" else fill
    return tv_tensors.wrap(F.pad_mask(inpt.as_subclass(Tensor), padding, value, "constant"), like=inpt)


@F.register_kernel(F.perspective, NormalMap)
@F.register_kernel(F.elastic, NormalMap)
def _refuse(inpt: NormalMap, *_: Any, **__: Any) -> NormalMap:
    raise TypeError("surface normals cannot follow a perspective or elastic transform; remove it")


def _scaled(normals: NormalMap, signs: tuple[int, int, int]) -> Tensor:
    return normals.as_subclass(Tensor) * torch.tensor(signs, dtype=normals.dtype).view(3, 1, 1)


def _turned(normals: NormalMap, clockwise: float) -> Tensor:
    """Return the vectors (3, H, W) turned in the image plane by an angle in degrees, as it is seen."""
    x, y, z = normals.as_subclass(Tensor)
    sine, cosine = math.sin(math.radians(clockwise)), math.cos(math.radians(clockwise))
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y, z])
