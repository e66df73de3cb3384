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
from torchvision.transforms.v2 import functional as F

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
_PIXELS_ONLY = tuple(
    getattr(v2, name)
    for name in NAMES
    if getattr(v2, name).__module__.endswith("._color")
    or name in ("GaussianBlur", "GaussianNoise", "JPEG", "RandomErasing")
)


class ColorJitter(v2.ColorJitter):
    """v2.ColorJitter on uint8 images in less time: the same options, draws and operations.

    Brightness, contrast and saturation are linear in a pixel's colours, its grey and the picture's mean grey, so those
    that follow each other are one pass over the picture. Values are cut at 0 and 255 once, at the end, where
    torchvision cuts and rounds after each.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, Tensor) or isinstance(inpt, tv_tensors.BoundingBoxes | tv_tensors.Mask):
            return inpt
        if inpt.dtype != torch.uint8 or inpt.shape[-3:-2] != (3,):
            return super().transform(inpt, params)
        image = inpt.as_subclass(Tensor)
        names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
        todo: list[tuple[str, float]] = []
        for number in params["fn_idx"].tolist():
            factor = params[names[number]]
            if factor is None:
                continue
            if names[number] == "hue_factor":
                image = F.adjust_hue(_recolour(image, todo), factor)
                todo = []
            else:
                todo.append((names[number], factor))
        image = _recolour(image, todo)
        return tv_tensors.wrap(image, like=inpt) if isinstance(inpt, tv_tensors.Image) else image


def _recolour(image: Tensor, todo: Sequence[tuple[str, float]]) -> Tensor:
    """Brightness, contrast and saturation in the order given: uint8 (3, H, W) -> the same.

    Each of them turns colours of the form own * x + common * grey(x) + offset into others of that form.
    """
    if not todo:
        return image
    flat = image.reshape(3, -1).to(torch.float32)  # (3, H * W)
    grey = _GREY @ flat  # (H * W,)
    own, common, offset = 1.0, 0.0, 0.0
    for name, factor in todo:
        if name == "saturation_factor":  # a blend with each pixel's grey
            own, common = factor * own, factor * common + (1 - factor) * (own + common)
        elif name == "contrast_factor":  # a blend with the mean grey of the picture as it is by now
            mean = (own + common) * float(grey.mean()) + offset
            own, common, offset = factor * own, factor * common, factor * offset + (1 - factor) * mean
        else:
            own, common, offset = factor * own, factor * common, factor * offset
    out = flat.mul_(own).add_(grey, alpha=common).add_(offset)
    return out.clamp_(0, 255).to(torch.uint8).view(image.shape)


_GREY = torch.tensor([0.2989, 0.587, 0.114])
NAMES["ColorJitter"] = ColorJitter

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
        # v2 takes less time the less it is given: no strings and numbers, and where only the pixels change a bare
        # tensor in place of the image.
        part: Sample = {key: sample[key] for key in ("boxes", "mask", "labels", "iscrowd") if key in sample}
        alone = not part
        image: Tensor = sample["image"].as_subclass(Tensor)
        for step in self.steps:
            if alone or isinstance(step, _PIXELS_ONLY):
                image = step(image)
            else:
                part = step({**part, "image": tv_tensors.Image(image)})
                image = part.pop("image").as_subclass(Tensor)
        if tuple(image.shape[-2:]) != self.image_size:
            part = self.resize({**part, "image": tv_tensors.Image(image)})
            image = part.pop("image").as_subclass(Tensor)
        if "boxes" in part:
            _sanitize(part, self.image_size)
        return {**sample, **part, "image": tv_tensors.Image(image)}

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
    if not bool(keep.all()):
        boxes = boxes[keep]
        for key in ("labels", "iscrowd"):
            if key in sample:
                sample[key] = sample[key][keep]
    sample["boxes"] = tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)


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
