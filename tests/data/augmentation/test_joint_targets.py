"""All kinds of targets of one image move with its pixels, in every transform that a joint group may have.

The image encodes where each of its pixels was, so that every target can be computed again from the moved image.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from allinone_ds.data.augmentation.catalog import NAMES, NOT_FOR, ONLY_FOR, PIXELS_ONLY
from allinone_ds.data.augmentation.objects import Points, corner
from allinone_ds.data.augmentation.transforms import train_transform
from tests.data.augmentation.test_dense_maps import OPTIONS, SIZE, target

KINDS = ("depth", "normals", "edges", "saliency", "segmentation", "detection", "instances", "keypoints")
JOINT = [n for n in sorted(NAMES) if n not in ONLY_FOR and not set(NOT_FOR.get(n, ())) & set(KINDS)]
MORE = {  # certain to move something, and little enough to keep the object in the image
    "CenterCrop": {"size": [50, 70]}, "Pad": {"padding": [3, 5, 7, 9]}, "RandomCrop": {"size": [50, 70]},
    "RandomHorizontalFlip": {"p": 1.0}, "RandomVerticalFlip": {"p": 1.0}, "RandomAffine": {"degrees": 20},
    "RandomRotation": {"degrees": 30}, "RandomResizedCrop": {"scale": [0.8, 1.0]},
    "ScaleJitter": {"scale_range": [0.8, 1.2]}, "RandomZoomOut": {"p": 1.0, "side_range": [1.2, 1.5]},
}  # fmt: skip
CORNERS = torch.tensor([[32.0, 22.0], [46.0, 24.0], [40.0, 38.0]])  # x, y


def joint_sample() -> dict:
    """One object of three points, a label map of stripes, and the maps of `test_dense_maps`."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    image = tv_tensors.Image(torch.stack([x * 3, y * 4, torch.full_like(x, 128)]).to(torch.uint8))
    box = tv_tensors.BoundingBoxes([[30.0, 20.0, 50.0, 40.0]], format="XYXY", canvas_size=SIZE)
    objects = {"boxes": box, "labels": torch.tensor([0]), "iscrowd": torch.tensor([False])}
    points = {"keypoints": Points(CORNERS[None], canvas_size=SIZE), "visible": torch.full((1, 3), 2, dtype=torch.uint8),
              "area": torch.tensor([400.0]), "mirrored": torch.tensor([[0, 1, 2]]), "corner": corner(SIZE)}  # fmt: skip
    targets = {
        **{kind: {kind: target(image, kind)} for kind in ("depth", "normals", "edges", "saliency")},
        "segmentation": {"mask": tv_tensors.Mask(stripes(image))},
        "detection": dict(objects),
        "instances": {**objects, "masks": tv_tensors.Mask(inside(image)[None])},
        "keypoints": {**objects, **points},
    }
    return {"image": image, "path": "x", "index": 0, "targets": targets}


def stripes(image: Tensor) -> Tensor:
    """Four classes, by the place that the pixels come from."""
    return (image[0] // 120 + 2 * (image[1] // 120)).to(torch.uint8)


def inside(image: Tensor) -> Tensor:
    x, y = image[0].float() / 3, image[1].float() / 4
    return ((x >= 30) & (x < 50) & (y >= 20) & (y < 40)).to(torch.uint8)


def near(mask: Tensor) -> Tensor:
    """True within two pixels of the mask."""
    return torch.nn.functional.max_pool2d(mask.float()[None], 5, 1, 2)[0] > 0


def outline(values: Tensor) -> Tensor:
    """True near a change of the values."""
    change = torch.zeros_like(values, dtype=torch.bool)
    change[:, 1:] |= values[:, 1:] != values[:, :-1]
    change[1:] |= values[1:] != values[:-1]
    return near(change)


@pytest.mark.parametrize("name", JOINT)
def test_every_kind_moves_as_the_pixels_do(name: str) -> None:
    torch.manual_seed(3)
    transform = train_transform([{name: MORE.get(name, OPTIONS.get(name, {}))}], SIZE, "joint")
    given = joint_sample()
    moved = transform(given)
    targets = moved["targets"]
    if issubclass(NAMES[name], PIXELS_ONLY):
        for kind, own in given["targets"].items():
            for key, value in own.items():
                same = torch.as_tensor(targets[kind][key]), torch.as_tensor(value)
                torch.testing.assert_close(*same, msg=f"{kind}.{key}")
        return
    image = moved["image"].as_subclass(Tensor)
    clear = (image[2] == 128) & ~near(image[2] != 128)  # not filled, and not mixed with what is
    assert clear.sum() > 500
    for kind in ("edges", "saliency"):
        expected = target(image, kind).as_subclass(Tensor)
        sure = clear & ~outline(expected)
        assert torch.equal(targets[kind][kind].as_subclass(Tensor)[sure], expected[sure]), kind
    known = targets["depth"]["depth"].as_subclass(Tensor).isfinite() & clear
    gap = (targets["depth"]["depth"] - target(image, "depth")).as_subclass(Tensor).abs()[known]
    assert known.sum() > 500 and gap.max() < 0.25
    z = targets["normals"]["normals"].as_subclass(Tensor)[2]
    known = z.isfinite() & clear
    assert known.sum() > 400 and (z - target(image, "normals").as_subclass(Tensor)[2]).abs()[known].max() < 0.03
    expected = stripes(image)
    sure = clear & ~outline(expected)
    assert torch.equal(targets["segmentation"]["mask"].as_subclass(Tensor)[sure], expected[sure])
    mask = targets["instances"]["masks"].as_subclass(Tensor)[0]
    sure = clear & ~outline(inside(image))
    assert torch.equal(mask[sure], inside(image)[sure])
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    tight = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    for kind in ("detection", "instances", "keypoints"):
        assert (targets[kind]["boxes"].as_subclass(Tensor)[0] - tight).abs().max() < 3, kind
    points = targets["keypoints"]
    seen = 0
    for (px, py), (x, y), visible in zip(
        points["keypoints"].as_subclass(Tensor)[0].tolist(),
        CORNERS.tolist(),
        points["visible"][0].tolist(),
        strict=True,
    ):
        if visible and 2 < px < image.shape[2] - 3 and 2 < py < image.shape[1] - 3:
            there = image[:, int(py), int(px)].float()
            assert abs(there[0] / 3 - x) < 2 and abs(there[1] / 4 - y) < 2, (px, py, there)
            seen += 1
    assert seen == 3
