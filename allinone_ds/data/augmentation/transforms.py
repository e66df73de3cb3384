"""From a sample to the input of the model: one branch of augmentation, plain resize, normalisation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.augmentation.branches import AugmentConfig, as_augment
from allinone_ds.data.augmentation.catalog import PIXELS_ONLY, build_transform
from allinone_ds.data.augmentation.geometry import DrawSample, MultiSampleTransform, sanitize_boxes
from allinone_ds.data.augmentation.objects import OF_OBJECTS
from allinone_ds.data.base import Sample
from allinone_ds.data.dense_maps import DenseMap, NormalMap
from allinone_ds.device_constants import constant
from allinone_ds.errors import AllInOneError, BrokenSample

MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of R, G, B on the scale 0..1."""
STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of R, G, B on the scale 0..1."""

_stacked: ContextVar[dict[tuple[int, ...], tuple[list[Any], Tensor]] | None] = ContextVar("stacked", default=None)
_MEAN_255, _STD_255 = (torch.tensor(values).mul_(255).tolist() for values in (MEAN, STD))

_TYPES: dict[str, type[tv_tensors.TVTensor]] = {
    "boxes": tv_tensors.BoundingBoxes,
    "mask": tv_tensors.Mask,
    "masks": tv_tensors.Mask,
    "keypoints": tv_tensors.KeyPoints,
    "depth": tv_tensors.Mask,
    "normals": NormalMap,
    "edges": tv_tensors.Mask,
    "saliency": tv_tensors.Mask,
}


class SampleTransform:
    """Applies the transforms of one branch to a sample, then resizes it to a fixed size.

    Boxes are cut at the border; those with a side below 1 pixel are dropped with their `labels`, `iscrowd`, keypoints
    and masks. Keypoints outside of the image are no longer visible, and a mirrored image swaps those of left and right.
    Every other `tv_tensors` of the sample (a `Mask` of depths) moves with the pixels; all else does not change. Pixels
    stay uint8. The targets of all tasks of a joint group move together.

    Args:
        branches: {name: (probability, torchvision v2 transforms)}; of several branches, every call draws one with
            torch's generator.
        image_size: (H, W) of the result in pixels.

    Example:
        >>> flip = SampleTransform({"flip": (1.0, [v2.RandomHorizontalFlip(p=1.0)])}, image_size=(2, 2))
        >>> image = tv_tensors.Image(torch.tensor([[[0, 255], [0, 255]]], dtype=torch.uint8).expand(3, 2, 2))
        >>> flip({"image": image, "label": 1})["image"][0].tolist()
        [[255, 0], [255, 0]]
    """

    augment: AugmentConfig | None = None
    """The configuration that `train_transform` made it from; None: it was made otherwise."""

    def __init__(self, branches: Mapping[str, tuple[float, Sequence[v2.Transform]]], image_size: tuple[int, int]):
        self.branches = {name: list(steps) for name, (_, steps) in branches.items()}
        self.probabilities = {name: probability for name, (probability, _) in branches.items()}
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.resize = v2.Resize(list(self.image_size), antialias=True)

    def __call__(self, sample: Sample, further: DrawSample | None = None) -> Sample:
        """Return the transformed sample.

        Args:
            sample: a sample as the dataset gives it; it is not modified.
            further: returns further samples of the dataset, for Mosaic and MixUp; the loaders provide it.

        Raises:
            BrokenSample: a transform cannot be applied to the image, for example because the image is too small.
            TypeError: the pixels are not uint8, or a target has a type that does not move as it must.
        """
        if sample["image"].dtype != torch.uint8:
            found = sample["image"].dtype
            raise TypeError(f"sample['image'] is {found}; give uint8 pixels, which the model normalises later")
        for target in (sample, *sample.get("targets", {}).values()):
            for key, kind in _TYPES.items():
                if key in target and not isinstance(target[key], kind):
                    raise TypeError(
                        f"sample['{key}'] is a {type(target[key]).__name__}, which does not move with the pixels; "
                        f"give a {'' if issubclass(kind, DenseMap) else 'tv_tensors.'}{kind.__name__}"
                    )
        return self._run(self.branches[self.draw()], sample, further)

    def draw(self) -> str:
        """Return the name of a branch, drawn by probability with torch's generator."""
        *names, last = self.branches
        if names:
            left = float(torch.rand(()))
            for name in names:
                left -= self.probabilities[name]
                if left < 0:
                    return name
        return last

    def only(self, name: str) -> SampleTransform:
        """Return the same transform with only one of its branches."""
        return SampleTransform({name: (1.0, self.branches[name])}, self.image_size)

    def _run(self, steps: Sequence[v2.Transform], sample: Sample, further: DrawSample | None) -> Sample:
        # v2 is faster on fewer values: no strings and numbers, and a plain tensor where only the pixels change.
        part = _moving(sample)
        targets = sample.get("targets", {})
        if targets:
            part["targets"] = {task: _moving(target) for task, target in targets.items()}
        only_image = not (any(part["targets"].values()) if targets else part)
        image: Tensor = sample["image"].as_subclass(Tensor)
        for step in steps:
            several = isinstance(step, MultiSampleTransform)
            if several and further is None:
                name = type(step).__name__
                raise ValueError(f"{name} combines several samples; call the transform with `further`")
            try:
                if not several and (only_image or isinstance(step, PIXELS_ONLY)):
                    image = step(image)
                    continue
                given = {**part, "image": tv_tensors.Image(image)}
                part = step(given, further) if several else step(given)
            except AllInOneError:  # of a further sample
                raise
            except Exception as error:  # for example a padding larger than the image; transforms may raise anything
                raise BrokenSample(str(sample.get("path", "sample")), _refusal(step, image, error)) from error
            image = part.pop("image").as_subclass(Tensor)
        if tuple(image.shape[-2:]) != self.image_size:
            part = self.resize({**part, "image": tv_tensors.Image(image)})
            image = part.pop("image").as_subclass(Tensor)
        moved: dict[str, Sample] = part.pop("targets", {})
        for target in (part, *moved.values()):
            if "boxes" in target:
                sanitize_boxes(target, self.image_size)
        if targets:
            part["targets"] = {task: {**targets[task], **target} for task, target in moved.items()}
        return {**sample, **part, "image": tv_tensors.Image(image)}

    def __repr__(self) -> str:
        return f"SampleTransform({self.branches}, image_size={self.image_size})"


def _moving(sample: Sample) -> Sample:
    """Return what of a sample moves with its pixels, and what is dropped with its boxes."""
    return {
        key: value
        for key, value in sample.items()
        if key in OF_OBJECTS or (isinstance(value, tv_tensors.TVTensor) and key != "image")
    }


def _refusal(step: v2.Transform, image: Tensor, error: Exception) -> str:
    height, width = image.shape[-2:]
    said = error if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"
    return (
        f"{step} cannot be applied to its {width} x {height} pixels (width x height): {said}; change the options of "
        "the transform in 'augment', put a resize before it, or remove the image"
    )


def train_transform(
    augment: AugmentConfig | Mapping[str, Any] | Sequence[Any], image_size: tuple[int, int], kind: str | None = None
) -> SampleTransform:
    """Return the transform of a config's `augment`.

    An entry is the name of a transform, or {name: {option: value}}; allowed are the transforms of torchvision v2 and
    `catalog.OWN`. The option `size` defaults to `image_size`. RandomApply, RandomChoice and RandomOrder have an option
    `transforms`, a list of entries in which a nested list is a sequence. RandomCrop pads images that are too small.
    Pixels of a mask that the image does not cover become 255 (ignore).

    Args:
        augment: a list of entries in the order they run, or `branches` of such lists; the final resize is added.
        image_size: (H, W) of the result in pixels.
        kind: kind of the data ("detection", ...), for which unsuitable transforms are refused; None allows all.

    Raises:
        ConfigError: an unknown transform or option, a value that the transform refuses, a transform that does not
            support the kind, or invalid branches (see `AugmentConfig`).

    Example:
        >>> transform = train_transform(["RandomHorizontalFlip", {"ColorJitter": {"brightness": 0.4}}], (64, 96))
        >>> image = tv_tensors.Image(torch.zeros(3, 50, 50, dtype=torch.uint8))
        >>> transform({"image": image, "label": 1})["image"].shape
        torch.Size([3, 64, 96])
    """
    size = (int(image_size[0]), int(image_size[1]))
    branches: dict[str, tuple[float, list[v2.Transform]]] = {}
    config = as_augment(augment)
    for name, branch in config.branches.items():
        location = config.location(name)
        steps = [build_transform(e, size, f"{location}[{n}]", kind) for n, e in enumerate(branch.transforms)]
        branches[name] = (branch.probability, steps)
    transform = SampleTransform(branches, size)
    transform.augment = config
    return transform


def eval_transform(image_size: tuple[int, int]) -> SampleTransform:
    """Return the plain resize to (H, W), without padding, so that two factors scale predictions back.

    Example:
        >>> image = tv_tensors.Image(torch.zeros(3, 50, 30, dtype=torch.uint8))
        >>> eval_transform((64, 96))({"image": image})["image"].shape
        torch.Size([3, 64, 96])
    """
    return train_transform([], image_size)


def normalize(images: Tensor) -> Tensor:
    """Normalise a batch with the mean and standard deviation of ImageNet.

    Args:
        images: uint8 (B, 3, H, W).

    Returns:
        float32 (B, 3, H, W)

    Example:
        >>> normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
        tensor([-2.1179, -2.0357, -1.8044])
    """
    images = images.as_subclass(Tensor)
    mean, std = (constant(values, images).view(1, 3, 1, 1) for values in (_MEAN_255, _STD_255))
    return images.to(torch.float32).sub_(mean).div_(std)


def stack_pixels(samples: Sequence[Sample]) -> Tensor:
    """Stack the images of transformed samples, which `AllInOneModel` normalises on its device.

    A worker sends a quarter of the bytes of `stack_images`; sending floats would take a quarter of the time of a
    mosaic.

    Args:
        samples: samples with `image` uint8 (3, H, W) of equal size.

    Returns:
        uint8 (B, 3, H, W)

    Example:
        >>> images = [tv_tensors.Image(torch.zeros(3, 4, 6, dtype=torch.uint8)) for _ in range(2)]
        >>> stack_pixels([{"image": image} for image in images]).shape
        torch.Size([2, 3, 4, 6])
    """
    images = [sample["image"] for sample in samples]
    known = _stacked.get()
    if known is None:
        return torch.stack([image.as_subclass(Tensor) for image in images])
    key = tuple(map(id, images))
    if key not in known:  # together with the images, so that no other object gets the id of one
        known[key] = images, torch.stack([image.as_subclass(Tensor) for image in images])
    return known[key][1]


@contextlib.contextmanager
def stacked_once() -> Iterator[None]:
    """Stack the same images once inside this block: all calls of `stack_pixels` for them return the same tensor.

    Example:
        >>> samples = [{"image": tv_tensors.Image(torch.zeros(3, 4, 6, dtype=torch.uint8))}]
        >>> with stacked_once():
        ...     stack_pixels(samples) is stack_pixels(samples)
        True
    """
    token = _stacked.set({})
    try:
        yield
    finally:
        _stacked.reset(token)


def stack_images(samples: Sequence[Sample]) -> Tensor:
    """Stack and normalise the images of transformed samples, for a `collate` that computes with them.

    Args:
        samples: samples with `image` uint8 (3, H, W) of equal size.

    Returns:
        float32 (B, 3, H, W), normalised

    Example:
        >>> stack_images([{"image": tv_tensors.Image(torch.zeros(3, 4, 6, dtype=torch.uint8))}]).dtype
        torch.float32
    """
    return normalize(stack_pixels(samples))
