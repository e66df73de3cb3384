"""Whether a sample has what its kind needs: for dataset classes of one's own, which nothing else has checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from allinone_ds.data.augmentation.objects import Points
from allinone_ds.data.base import IGNORE, SampleDataset
from allinone_ds.data.dense_maps import DenseMap, EdgeMap, NormalMap

Size = tuple[int, int]


def fault_of(dataset: SampleDataset, sample: Any) -> str | None:
    """Return what a sample of a dataset lacks, or None."""
    kinds = getattr(dataset, "kinds", None)  # of a joint group
    if kinds is not None:
        return joint_sample_fault(sample, kinds, dataset.classes_of)  # type: ignore[attr-defined]
    return sample_fault(sample, dataset.kind, dataset.classes)


def sample_fault(sample: Any, kind: str, classes: Sequence[str]) -> str | None:
    """Return what a sample lacks, or None; see `allinone_ds.data.base.Sample` for what it has.

    Args:
        sample: what the dataset returned.
        kind: kind of the dataset; of one that the package does not know, only the image is checked.
        classes: class names of the dataset.

    Example:
        >>> image = tv_tensors.Image(torch.zeros(3, 4, 4, dtype=torch.uint8))
        >>> sample_fault({"image": image, "path": "1.png", "label": 2}, "classification", ["cat", "dog"])
        'label is 2; allowed are 0..1, the places of the 2 classes'
    """
    return _common_fault(sample) or _target_fault(sample, kind, classes, tuple(sample["image"].shape[-2:]))


def joint_sample_fault(sample: Any, kinds: Any, classes_of: Any) -> str | None:
    """Return what a sample of a joint group lacks, or None.

    Args:
        sample: what the dataset returned.
        kinds: task -> kind.
        classes_of: task -> class names.
    """
    if fault := _common_fault(sample):
        return fault
    targets = sample.get("targets")
    if not isinstance(targets, dict):
        return f"has no dict 'targets'; return task -> keys of its kind, for {', '.join(kinds)}"
    for task, own in targets.items():
        if task not in kinds:
            return f"has targets of '{task}', which is no task of the group ({', '.join(kinds)}); remove them"
        if not isinstance(own, dict):
            return f"targets['{task}'] is a {type(own).__name__}; give a dict with the keys of {kinds[task]}"
        if fault := _target_fault(own, kinds[task], classes_of[task], tuple(sample["image"].shape[-2:])):
            return f"targets['{task}']: {fault}"
    return None


def _common_fault(sample: Any) -> str | None:
    if not isinstance(sample, dict):
        return f"is a {type(sample).__name__}; return a dict with image, path, index and the target"
    image = sample.get("image")
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        return f"image is {_described(image)}; give a tv_tensors.Image, uint8 (3, H, W)"
    if not isinstance(sample.get("path"), str):
        return f"path is {sample.get('path')!r}; give the file, or self.path(index), as text"
    return None


def _target_fault(sample: dict[str, Any], kind: str, classes: Sequence[str], size: Size) -> str | None:
    check = _CHECKS.get(kind)
    return None if check is None else check(sample, len(classes), size)


def _mask(
    key: str, cls: type[Tensor], form: str, least: float, most: float, channels: int = 0
) -> Callable[..., str | None]:
    """Return the check of a map under `key`, whose values lie in `least`..`most`, or are 255 or NaN."""

    def check(sample: dict[str, Any], count: int, size: Size) -> str | None:
        found = sample.get(key)
        shape = (channels, *size) if channels else size
        if not isinstance(found, cls) or tuple(found.shape) != shape or found.is_floating_point() != (form == "float"):
            dims = " x ".join(map(str, shape))
            return f"{key} is {_described(found)}; give a {cls.__name__} of {form}, {dims} as the image has"
        values = found.as_subclass(Tensor)
        high = count - 1 if most < 0 else most
        bad = (values < least) | (values > high)
        bad &= values.isfinite() if form == "float" else values != IGNORE
        if bool(bad.any()):
            empty = "NaN" if form == "float" else str(IGNORE)
            return f"{key} holds {values[bad][0].item():g}; allowed are {least:g}..{high:g}, and {empty} for no value"
        return None

    return check


def _label(sample: dict[str, Any], count: int, size: Size) -> str | None:
    label = sample.get("label")
    try:
        number = int(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < count:
        return f"label is {label!r}; allowed are 0..{count - 1}, the places of the {count} classes"
    return None


def _numbers(key: str, flags: bool) -> Callable[..., str | None]:
    def check(sample: dict[str, Any], count: int, size: Size) -> str | None:
        given = sample.get(key)
        found = torch.as_tensor(given) if isinstance(given, Sequence | np.ndarray) else given
        if not isinstance(found, Tensor) or tuple(found.shape) != (count,):
            return f"{key} is {_described(found)}; give numbers, one per class ({count}), NaN where it is not known"
        found = found.double()
        if flags and not bool(((found == 0) | (found == 1) | found.isnan()).all()):
            return f"{key} holds {found[~((found == 0) | (found == 1) | found.isnan())][0]:g}; allowed are 0, 1 and NaN"
        return f"{key} holds an infinite number" if bool(found.isinf().any()) else None

    return check


def _objects(sample: dict[str, Any], count: int, size: Size) -> str | None:
    boxes, labels = sample.get("boxes"), sample.get("labels")
    if not isinstance(boxes, tv_tensors.BoundingBoxes) or boxes.format != tv_tensors.BoundingBoxFormat.XYXY:
        form = f"in {boxes.format.value}" if isinstance(boxes, tv_tensors.BoundingBoxes) else _described(boxes)
        return f"boxes are {form}; give tv_tensors.BoundingBoxes in XYXY"
    if tuple(boxes.canvas_size) != size:
        return f"canvas_size of the boxes is {tuple(boxes.canvas_size)}, the image is {size} (height, width)"
    n = len(boxes)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or tuple(labels.shape) != (n,):
        return f"labels is {_described(labels)}; give one integer per box ({n})"
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        wrong = int(labels.max() if labels.max() >= count else labels.min())
        return f"labels holds {wrong}; allowed are 0..{count - 1}, the places of the {count} classes"
    if "iscrowd" in sample and tuple(torch.as_tensor(sample["iscrowd"]).shape) != (n,):
        return f"iscrowd is {_described(sample['iscrowd'])}; give one bool per box ({n})"
    return None


def _instances(sample: dict[str, Any], count: int, size: Size) -> str | None:
    if fault := _objects(sample, count, size):
        return fault
    masks, n = sample.get("masks"), len(sample["boxes"])
    if not isinstance(masks, tv_tensors.Mask) or tuple(masks.shape) != (n, *size):
        return f"masks is {_described(masks)}; give a tv_tensors.Mask, {n} x {size[0]} x {size[1]}: one per box"
    return None


def _keypoints(sample: dict[str, Any], count: int, size: Size) -> str | None:
    if fault := _objects(sample, count, size):
        return fault
    points, n = sample.get("keypoints"), len(sample["boxes"])
    if not isinstance(points, Points) or points.dim() != 3 or len(points) != n or points.shape[2] != 2:
        return f"keypoints is {_described(points)}; give Points ({n}, P, 2) of x and y: one row per box"
    for key, shape in (("visible", points.shape[:2]), ("mirrored", points.shape[:2]), ("area", (n,))):
        found = sample.get(key)
        if not isinstance(found, Tensor) or tuple(found.shape) != tuple(shape):
            return f"{key} is {_described(found)}; give a tensor {tuple(shape)}"
    return None if "corner" in sample else "has no 'corner'; add allinone_ds.data.augmentation.objects.corner((H, W))"


_CHECKS: dict[str, Callable[[dict[str, Any], int, Size], str | None]] = {
    "segmentation": _mask("mask", tv_tensors.Mask, "integers", 0, -1),
    "depth": _mask("depth", DenseMap, "float", torch.finfo(torch.float32).tiny, float("inf")),
    "normals": _mask("normals", NormalMap, "float", -1.01, 1.01, channels=3),
    "edges": _mask("edges", EdgeMap, "integers", 0, 1),
    "saliency": _mask("saliency", tv_tensors.Mask, "integers", 0, 1),
    "classification": _label,
    "retrieval": _label,
    "attributes": _numbers("attributes", flags=True),
    "regression": _numbers("value", flags=False),
    "detection": _objects,
    "instances": _instances,
    "keypoints": _keypoints,
}


def _described(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
