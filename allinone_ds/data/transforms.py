"""From a sample to the network's input: augmentation named as in torchvision v2, plain resize,
normalisation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.base import Sample
from allinone_ds.strict import ConfigError, did_you_mean

MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of R, G, B on the scale 0..1."""
STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of R, G, B on the scale 0..1."""

# Not for a config: they work on whole batches, give several pictures, take code, or leave uint8 RGB.
_REFUSED = {
    "Transform", "CutMix", "MixUp", "FiveCrop", "TenCrop", "Lambda", "LinearTransformation",
    "Normalize", "ToDtype", "ConvertImageDtype", "PILToTensor", "ToImage", "ToPILImage", "ToPureTensor",
    "ToTensor", "SanitizeKeyPoints", "ClampKeyPoints", "ConvertBoundingBoxFormat", "SetClampingMode",
    "UniformTemporalSubsample", "Compose", "SanitizeBoundingBoxes", "Grayscale",
}  # fmt: skip
NAMES = {
    name: cls
    for name, cls in vars(v2).items()
    if isinstance(cls, type) and issubclass(cls, v2.Transform) and name not in _REFUSED
}
"""Every augmentation that a config may name."""

Augment = Sequence[str | Mapping[str, Any]]


class SampleTransform:
    """Sample -> sample of a fixed size: augmentation, then plain resize, then the boxes are put right.

    Boxes are cut at the border; those below 1 pixel a side go, with their `labels` and `iscrowd`. Keys that
    are no pixels pass through. Pixels stay uint8: `stack_images` normalises whole batches.

    Args:
        steps: torchvision v2 transforms.
        image_size: (H, W) of the result.
    """

    def __init__(self, steps: Sequence[v2.Transform], image_size: tuple[int, int]):
        self.steps = list(steps)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.resize = v2.Resize(list(self.image_size), antialias=True)

    def __call__(self, sample: Sample) -> Sample:
        out = dict(sample)
        # v2 costs less the less it is given: a bare tensor for a bare image, no strings and numbers.
        keys = [key for key in ("image", "boxes", "mask", "labels", "iscrowd") if key in sample]
        if keys == ["image"]:
            image: Any = sample["image"].as_subclass(Tensor)
            for step in self.steps:
                image = step(image)
            if tuple(image.shape[-2:]) != self.image_size:
                image = self.resize(image)
            out["image"] = tv_tensors.Image(image)
        else:
            part: Sample = {key: sample[key] for key in keys}
            for step in self.steps:
                part = step(part)
            if tuple(part["image"].shape[-2:]) != self.image_size:
                part = self.resize(part)
            out.update(part)
        if "boxes" in out:
            _sanitize(out, self.image_size)
        return out

    def __repr__(self) -> str:
        return f"SampleTransform({self.steps}, image_size={self.image_size})"


def train_transform(augment: Augment, image_size: tuple[int, int]) -> SampleTransform:
    """The transform of a config's `augment` list.

    An entry is the name of a torchvision v2 transform, or {name: {option: value}}. `size` is filled in with
    `image_size` where the class needs one. RandomApply, RandomChoice and RandomOrder take `transforms`, a
    list of such entries, in which a list is a branch of several. RandomCrop pads images that are too small.
    Pixels of a mask that a transform uncovers become 255 (ignore).

    Args:
        augment: entries in the order they run; the final resize is added.
        image_size: (H, W) of the result.

    Raises:
        ConfigError: an unknown name (the nearest is told), an unknown option, or a value that torchvision
        refuses.
    """
    size = (int(image_size[0]), int(image_size[1]))
    return SampleTransform([_build(entry, size, f"augment[{n}]") for n, entry in enumerate(augment)], size)


def eval_transform(image_size: tuple[int, int]) -> SampleTransform:
    """Plain resize to (H, W), without padding: predictions scale back by H and W alone."""
    return train_transform([], image_size)


def normalize(images: Tensor) -> Tensor:
    """ImageNet normalisation of a batch.

    Args:
        images: uint8 (B, 3, H, W).

    Returns:
        float32 (B, 3, H, W)
    """
    mean = torch.tensor(MEAN, device=images.device).mul_(255).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).mul_(255).view(1, 3, 1, 1)
    return images.as_subclass(Tensor).to(torch.float32).sub_(mean).div_(std)


def stack_images(samples: Sequence[Sample]) -> Tensor:
    """The images of transformed samples as the network's input.

    Args:
        samples: each with `image` uint8 (3, H, W), all of one size.

    Returns:
        float32 (B, 3, H, W), normalised
    """
    return normalize(torch.stack([sample["image"].as_subclass(Tensor) for sample in samples]))


def _sanitize(sample: Sample, size: tuple[int, int]) -> None:
    """Cuts boxes at the border and drops those below 1 pixel a side, in place.

    The rule of v2.ClampBoundingBoxes and v2.SanitizeBoundingBoxes at a tenth of their time.
    """
    boxes = sample["boxes"].as_subclass(Tensor).clone()  # (n, 4) XYXY
    boxes[:, 0::2].clamp_(0, size[1])
    boxes[:, 1::2].clamp_(0, size[0])
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)  # (n,)
    for key in ("labels", "iscrowd"):
        if key in sample:
            sample[key] = sample[key][keep]
    sample["boxes"] = tv_tensors.BoundingBoxes(boxes[keep], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)


def _build(entry: Any, size: tuple[int, int], where: str) -> v2.Transform:
    """One v2 transform from a config entry; `where` is the entry's place in error messages."""
    if isinstance(entry, list | tuple):  # a branch: several transforms in a row
        return v2.Compose([_build(e, size, f"{where}[{n}]") for n, e in enumerate(entry)])
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        options = dict(options or {})
    elif isinstance(entry, str):
        name, options = entry, {}
    else:
        raise ConfigError(f"{where}: {entry!r} must be a transform's name or {{name: {{option: value}}}}")
    cls = NAMES.get(name)
    if cls is None:
        raise ConfigError(f"{where}: there is no augmentation '{name}'; {did_you_mean(str(name), NAMES)}")
    allowed = [p for p in inspect.signature(cls).parameters if p not in ("self", "args", "kwargs")]
    for option in options:
        if option not in allowed:
            raise ConfigError(f"{where}: {name} has no option '{option}'; {did_you_mean(str(option), allowed)}")
    if "transforms" in options:
        options["transforms"] = [
            _build(e, size, f"{where}.transforms[{n}]") for n, e in enumerate(options["transforms"])
        ]
    if "interpolation" in options:
        kinds = {mode.value: mode for mode in v2.InterpolationMode}
        wanted = options["interpolation"]
        if wanted not in kinds:
            raise ConfigError(f"{where}: {name}: interpolation is '{wanted}'; {did_you_mean(str(wanted), kinds)}")
        options["interpolation"] = kinds[wanted]
    for option in ("size", "target_size"):
        if option in allowed and option not in options:
            options[option] = size
    if "pad_if_needed" in allowed:
        options.setdefault("pad_if_needed", True)  # otherwise the first small image ends the run
    if "fill" in allowed:
        fill = options.get("fill", 0)
        options["fill"] = {tv_tensors.Mask: 255, "others": 0 if fill is None else fill}
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {name} cannot be made from {dict(entry) if options else {}}: {error}") from None
