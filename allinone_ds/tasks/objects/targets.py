"""Targets that keypoints and instances share: the boxes of the objects that are learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors

from allinone_ds.data.base import Sample
from allinone_ds.errors import ConfigError


def learned_objects(sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Return "boxes" (m, 4) float32 and "labels" (m,) of the objects that are no crowds, and which they are, bool (n,).

    Args:
        sample: a transformed sample.
    """
    boxes = sample["boxes"].as_subclass(Tensor).float().reshape(-1, 4)
    crowd = sample.get("iscrowd")
    keep = torch.ones(len(boxes), dtype=torch.bool) if crowd is None else ~crowd.bool()
    return {"boxes": boxes[keep], "labels": sample["labels"].long()[keep]}, keep


def empty_objects(sample: Sample) -> Sample:
    """Return a sample with its image and without any object."""
    size = sample["image"].shape[-2:]
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(size))  # type: ignore[call-overload]
    nothing = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.long), "iscrowd": torch.zeros(0, dtype=torch.bool)}
    return {**sample, **nothing}


def check_lowest(name: str, threshold: float, lowest: float) -> None:
    """Check that the head keeps boxes of this score.

    Raises:
        ConfigError: the head drops them.
    """
    if threshold < lowest:
        raise ConfigError(
            f"threshold {threshold}: the head of '{name}' drops boxes below tasks.{name}.options.score_threshold = "
            f"{lowest}; give at least {lowest}, or lower the option"
        )
