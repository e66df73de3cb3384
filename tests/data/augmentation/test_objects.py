"""Objects, their boxes, masks and keypoints move together under every transform of the catalogue."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from allinone_ds.data.augmentation.catalog import CONFLICTS, NAMES, ONLY_FOR, PIXELS_ONLY
from allinone_ds.data.augmentation.objects import Points, corner
from allinone_ds.data.augmentation.transforms import train_transform
from allinone_ds.errors import ConfigError

SIDE = 96
OPTIONS = {
    "CenterCrop": {"size": [70, 60]},
    "ElasticTransform": {"alpha": 20.0},
    "Pad": {"padding": [5, 9, 13, 3]},
    "RandomAffine": {"degrees": 30, "translate": [0.1, 0.1], "scale": [0.8, 1.2], "shear": 10},
    "RandomCrop": {"size": [80, 70]},
    "RandomHorizontalFlip": {"p": 1.0},
    "RandomPerspective": {"p": 1.0, "distortion_scale": 0.3},
    "RandomResize": {"min_size": 60, "max_size": 120},
    "RandomRotation": {"degrees": 40, "expand": True},
    "RandomShortestSize": {"min_size": [80]},
    "RandomVerticalFlip": {"p": 1.0},
    "RandomZoomOut": {"p": 1.0, "side_range": [1.2, 1.5]},
    "RandomApply": {"p": 1.0, "transforms": ["RandomHorizontalFlip"]},
    "RandomChoice": {"transforms": ["RandomHorizontalFlip", "RandomVerticalFlip"]},
    "RandomOrder": {"transforms": ["RandomHorizontalFlip", {"Pad": {"padding": 4}}]},
    "GaussianBlur": {"kernel_size": 3},
    "RandomPosterize": {"bits": 4},
    "RandomSolarize": {"threshold": 200},
    "ScaleJitter": {},
    "JPEG": {"quality": 60},
    "RandomAdjustSharpness": {"sharpness_factor": 2.0},
}
ALLOWED = [name for name in sorted(NAMES) if "keypoints" in ONLY_FOR.get(name, ("keypoints",))]
MOVING = [name for name in ALLOWED if not issubclass(NAMES[name], PIXELS_ONLY)]


def scene() -> dict:
    """Two bright triangles whose corners are keypoints 0 (head), 1 (left) and 2 (right), on a dark image."""
    corners = torch.tensor([[[30.0, 20.0], [18.0, 50.0], [46.0, 46.0]], [[66.0, 40.0], [52.0, 76.0], [84.0, 70.0]]])
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    masks = []
    for triangle in corners:
        inside = torch.ones(SIDE, SIDE, dtype=torch.bool)
        for i in range(3):
            (x1, y1), (x2, y2), (x3, y3) = triangle[i], triangle[(i + 1) % 3], triangle[(i + 2) % 3]
            side = (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)
            inside &= side * ((x2 - x1) * (y3 - y1) - (y2 - y1) * (x3 - x1)) >= 0
        masks.append(inside)
    stacked = torch.stack(masks)
    image = torch.where(stacked.any(0), 255, 0).to(torch.uint8).expand(3, SIDE, SIDE).clone()
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    size = (SIDE, SIDE)
    return {
        "image": tv_tensors.Image(image),
        "path": "x.png",
        "index": 0,
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.tensor([0, 1]),
        "iscrowd": torch.zeros(2, dtype=torch.bool),
        "masks": tv_tensors.Mask(stacked.to(torch.uint8)),
        "keypoints": Points(corners, canvas_size=size),
        "visible": torch.full((2, 3), 2, dtype=torch.uint8),
        "area": torch.tensor([400.0, 500.0]),
        "mirrored": torch.tensor([[0, 2, 1], [0, 2, 1]]),
        "corner": corner(size),
    }


def transform(entry, kind="keypoints"):
    name = entry if isinstance(entry, str) else next(iter(entry))
    options = {} if isinstance(entry, dict) else OPTIONS.get(name, {})
    return train_transform([{name: options} if isinstance(entry, str) else entry], (SIDE, SIDE), kind)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("seed", [0, 1])
def test_masks_points_and_boxes_stay_on_their_object(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    moved = transform(name)(scene())
    masks = moved["masks"].as_subclass(Tensor).bool()
    bright = moved["image"].as_subclass(Tensor)[0] > 127
    assert len(masks) == len(moved["boxes"]) == len(moved["keypoints"]) == len(moved["visible"]) > 0
    differ = (masks.any(0) != bright).sum() / bright.sum()
    assert differ < 0.22, float(differ)  # at the border: torchvision resizes masks to the nearest pixel
    for mask, box, points, visible in zip(masks, moved["boxes"], moved["keypoints"], moved["visible"], strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        tight = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (box.as_subclass(Tensor) - tight).abs().max() < 4, (name, box, tight)
        y, x = mask.nonzero(as_tuple=True)
        for (px, py), seen in zip(points.as_subclass(Tensor).tolist(), visible.tolist(), strict=True):
            inside = 0 <= px <= SIDE and 0 <= py <= SIDE
            assert bool(seen) == inside
            if inside and 3 < px < SIDE - 3 and 3 < py < SIDE - 3:  # its tip may lie in a neighbouring pixel
                near = ((x + 0.5 - px) ** 2 + (y + 0.5 - py) ** 2).min().sqrt()
                assert near < 4, (name, px, py, float(near))


@pytest.mark.parametrize("name", MOVING)
def test_left_and_right_are_what_they_are_in_the_image(name: str) -> None:
    """Seen from point 0, point 1 is on the same side of point 2 before and after, whether the image is mirrored."""

    def side(points: Tensor) -> Tensor:
        a, b = points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
        return (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sign()

    torch.manual_seed(3)
    whole = scene()
    before = side(whole["keypoints"].as_subclass(Tensor))[0]
    for _ in range(4):
        moved = transform(name)(whole)
        assert (side(moved["keypoints"].as_subclass(Tensor)) == before).all()


def test_a_flip_swaps_points_and_their_visibility_and_two_flips_do_not() -> None:
    whole = scene()
    whole["visible"][0] = torch.tensor([2, 1, 0])
    once = transform("RandomHorizontalFlip")(whole)
    x = once["keypoints"].as_subclass(Tensor)[0]
    assert x.tolist() == [[66.0, 20.0], [50.0, 46.0], [78.0, 50.0]] and once["visible"][0].tolist() == [2, 0, 1]
    twice = transform("RandomHorizontalFlip")(once)
    assert torch.equal(twice["keypoints"].as_subclass(Tensor), whole["keypoints"].as_subclass(Tensor))
    assert twice["visible"][0].tolist() == [2, 1, 0]
    turned = train_transform([{"RandomHorizontalFlip": {"p": 1.0}}, {"RandomVerticalFlip": {"p": 1.0}}], (SIDE, SIDE))
    assert turned(whole)["visible"][0].tolist() == [2, 1, 0]  # a turn by 180 degrees


@pytest.mark.parametrize("kind", ["keypoints", "instances"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ALLOWED)))
def test_what_cannot_move_objects_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} supports only"):
        transform({name: {}}, kind)


@pytest.mark.parametrize("name", ALLOWED)
def test_images_without_objects_pass(name: str) -> None:
    torch.manual_seed(0)
    whole = scene()
    keys = ("labels", "iscrowd", "visible", "area", "mirrored")
    empty = {**whole, **{key: whole[key][:0] for key in keys}}
    for key in ("boxes", "masks", "keypoints"):
        empty[key] = tv_tensors.wrap(whole[key].as_subclass(Tensor)[:0], like=whole[key])
    moved = transform(name)(empty)
    assert moved["masks"].shape == (0, SIDE, SIDE) and moved["keypoints"].shape == (0, 3, 2)


def test_an_object_that_leaves_the_image_is_dropped_with_all_that_belongs_to_it() -> None:
    moved = train_transform([{"CenterCrop": {"size": [30, 30]}}], (30, 30), "instances")(
        {**scene(), "boxes": scene()["boxes"]}
    )
    counts = {key: len(moved[key]) for key in ("boxes", "labels", "iscrowd", "masks", "keypoints", "visible", "area")}
    assert len(set(counts.values())) == 1
    assert moved["masks"].flatten(1).any(1).all()


def test_every_transform_with_needed_options_is_tried() -> None:
    for name in ALLOWED:
        needed = [
            p for p in list(inspect.signature(NAMES[name].__init__).parameters.values())[1:]
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("size", "target_size")
        ]  # fmt: skip
        assert not needed or name in OPTIONS, name
    assert CONFLICTS
