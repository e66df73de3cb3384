"""From a sample to the network's input: one branch of augmentation, plain resize, normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.augmentation.branches import AugmentConfig, as_augment
from allinone_ds.data.augmentation.catalog import PIXELS_ONLY, build
from allinone_ds.data.augmentation.geometry import Join, More, put_right
from allinone_ds.data.base import Sample

MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of R, G, B on the scale 0..1."""
STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of R, G, B on the scale 0..1."""


_TYPES = {"boxes": tv_tensors.BoundingBoxes, "mask": tv_tensors.Mask}


class SampleTransform:
    """Sample -> sample of a fixed size: the transforms of one branch, plain resize, then the boxes are put right.

    Boxes are cut at the border; those below 1 pixel a side go, with their `labels` and `iscrowd`. Whatever else of a
    sample is a `tv_tensors` (a `Mask` of depths, `KeyPoints`) moves with the pixels too; anything else passes through.
    Pixels stay uint8.

    Args:
        branches: {name: (probability, torchvision v2 transforms)}; where there are several, each call draws one with
            torch's generator.
        image_size: (H, W) of the result.
    """

    def __init__(self, branches: Mapping[str, tuple[float, Sequence[v2.Transform]]], image_size: tuple[int, int]):
        self.branches = {name: list(steps) for name, (_, steps) in branches.items()}
        self.probabilities = {name: probability for name, (probability, _) in branches.items()}
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.resize = v2.Resize(list(self.image_size), antialias=True)

    def __call__(self, sample: Sample, more: More | None = None) -> Sample:
        """Transforms one sample.

        Args:
            sample: as the dataset gives it; it is left alone.
            more: gives further samples of the dataset, for Mosaic and MixUp; loaders give it.

        Raises:
            TypeError: pixels that are not uint8, boxes or a mask that torchvision would leave where they are.
        """
        if sample["image"].dtype != torch.uint8:
            raise TypeError(f"sample['image'] is {sample['image'].dtype}; give uint8 pixels, they are normalised later")
        for key, kind in _TYPES.items():
            if key in sample and not isinstance(sample[key], kind):
                found = type(sample[key]).__name__
                raise TypeError(f"sample['{key}'] is a {found}, which would not move with the pixels; give a "
                                f"tv_tensors.{kind.__name__}")  # fmt: skip
        return self._run(self.branches[self.draw()], sample, more)

    def draw(self) -> str:
        """Name of a branch, drawn by the probabilities with torch's generator."""
        *names, last = self.branches
        if names:
            left = float(torch.rand(()))
            for name in names:
                left -= self.probabilities[name]
                if left < 0:
                    return name
        return last

    def only(self, name: str) -> SampleTransform:
        """The same transform with one of its branches alone."""
        return SampleTransform({name: (1.0, self.branches[name])}, self.image_size)

    def _run(self, steps: Sequence[v2.Transform], sample: Sample, more: More | None) -> Sample:
        # v2 takes less time the less it is given: no strings and numbers, and where only the pixels change a bare
        # tensor in place of the image.
        part: Sample = {
            key: value
            for key, value in sample.items()
            if key in ("labels", "iscrowd") or (isinstance(value, tv_tensors.TVTensor) and key != "image")
        }
        alone = not part
        image: Tensor = sample["image"].as_subclass(Tensor)
        for step in steps:
            if isinstance(step, Join):
                if more is None:
                    raise ValueError(f"{type(step).__name__} takes further samples: call the transform with `more`")
                part = step({**part, "image": tv_tensors.Image(image)}, more)
            elif alone or isinstance(step, PIXELS_ONLY):
                image = step(image)
                continue
            else:
                part = step({**part, "image": tv_tensors.Image(image)})
            image = part.pop("image").as_subclass(Tensor)
        if tuple(image.shape[-2:]) != self.image_size:
            part = self.resize({**part, "image": tv_tensors.Image(image)})
            image = part.pop("image").as_subclass(Tensor)
        if "boxes" in part:
            put_right(part, self.image_size)
        return {**sample, **part, "image": tv_tensors.Image(image)}

    def __repr__(self) -> str:
        return f"SampleTransform({self.branches}, image_size={self.image_size})"


def train_transform(
    augment: AugmentConfig | Mapping[str, Any] | Sequence[Any], image_size: tuple[int, int], kind: str | None = None
) -> SampleTransform:
    """The transform of a config's `augment`.

    An entry is the name of a transform, or {name: {option: value}}: those of torchvision v2, and `catalog.OWN`. `size`
    is filled in with `image_size` where the class has one. RandomApply, RandomChoice and RandomOrder take `transforms`,
    a list of such entries, in which a list stands for several in a row. RandomCrop pads images that are too small.
    Pixels of a mask that a transform uncovers become 255 (ignore).

    Args:
        augment: a list of entries in the order they run, or `branches` of such; the final resize is added.
        image_size: (H, W) of the result.
        kind: of the data ("detection", ...), to refuse transforms that are not for it.

    Raises:
        ConfigError: an unknown name (the nearest is told), an unknown option, a value that the transform refuses, a
            transform that is not for the kind, or branches that do not fit (see `AugmentConfig`).
    """
    size = (int(image_size[0]), int(image_size[1]))
    branches: dict[str, tuple[float, list[v2.Transform]]] = {}
    config = as_augment(augment)
    for name, branch in config.branches.items():
        place = config.place(name)
        steps = [build(e, size, f"{place}[{n}]", kind) for n, e in enumerate(branch.transforms)]
        branches[name] = (branch.probability, steps)
    return SampleTransform(branches, size)


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


def stack_pixels(samples: Sequence[Sample]) -> Tensor:
    """The images of transformed samples as they are; `AllInOneModel` normalises them where it runs.

    A quarter of the bytes of `stack_images` on the way from a loader's worker to the device: sending floats would cost
    a worker a quarter of the time of a mosaic.

    Args:
        samples: each with `image` uint8 (3, H, W), all of one size.

    Returns:
        uint8 (B, 3, H, W)
    """
    return torch.stack([sample["image"].as_subclass(Tensor) for sample in samples])


def stack_images(samples: Sequence[Sample]) -> Tensor:
    """The images of transformed samples, normalised: for a `collate` that computes with them.

    Args:
        samples: each with `image` uint8 (3, H, W), all of one size.

    Returns:
        float32 (B, 3, H, W), normalised
    """
    return normalize(stack_pixels(samples))
