"""Targets that keypoints and instances share: the boxes of the objects that are learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors

from allinone_ds.data.base import Sample


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
