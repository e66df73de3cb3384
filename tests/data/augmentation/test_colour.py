"""Transforms of the pixel values: equal to a reference, and without effect on boxes and masks."""

import colorsys

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.augmentation.colour import ColorJitter, ColorRandAugment, HSVJitter, change_hsv
from allinone_ds.data.augmentation.weather import Fog, Frost, Rain, Spatter


def test_change_hsv_equals_colorsys():
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 9, 8), dtype=torch.uint8, generator=g)
    image[:, 0] = torch.arange(8, dtype=torch.uint8) * 36  # grey levels including black
    for shift, saturation, value in ((0.0, 1.0, 1.0), (0.7, 1.3, 0.8), (-1.9, 0.4, 1.2), (3.0, 1.0, 1.0)):
        found = change_hsv(image, shift, saturation, value)
        for y in range(9):
            for x in range(8):
                h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
                expected = colorsys.hsv_to_rgb((h + shift / 6) % 1, min(s * saturation, 1), min(v * value, 1))
                assert torch.allclose(
                    found[:, y, x].float(), torch.tensor(expected, dtype=torch.float32) * 255, atol=1.01
                ), (y, x)
    assert torch.equal(change_hsv(image, 0.0, 1.0, 1.0), image)


@pytest.mark.parametrize("transform", [HSVJitter(), ColorRandAugment(2), Fog(), Frost(), Rain(), Spatter()], ids=repr)
@pytest.mark.parametrize("size", [(20, 31), (96, 64)])
def test_pixel_transforms_change_only_pixels(transform, size):
    g = torch.Generator().manual_seed(1)
    image = tv_tensors.Image(torch.randint(40, 200, (3, *size), dtype=torch.uint8, generator=g))
    mask = tv_tensors.Mask(torch.randint(0, 4, size, dtype=torch.uint8, generator=g))
    boxes = tv_tensors.BoundingBoxes([[1.0, 2.0, 9.0, 8.0]], format="XYXY", canvas_size=size)
    before = image.clone()
    changed = 0
    for seed in range(8):
        torch.manual_seed(seed)
        out = transform({"image": image, "mask": mask, "boxes": boxes})
        assert type(out["image"]) is tv_tensors.Image and out["image"].dtype == torch.uint8
        assert out["image"].shape == image.shape
        assert torch.equal(out["mask"], mask) and torch.equal(out["boxes"], boxes)
        changed += not torch.equal(out["image"], before)
        torch.manual_seed(seed)
        assert torch.equal(transform(image), out["image"])
    assert changed >= 5 and torch.equal(image, before)


JITTERS = [
    {"brightness": 0.3},
    {"contrast": 0.3},
    {"saturation": 0.3},
    {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3},
    {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1},
]


@pytest.mark.parametrize("options", JITTERS, ids=str)
def test_color_jitter_equals_torchvision_within_rounding(options):
    g = torch.Generator().manual_seed(0)
    changes = []
    for seed in range(12):
        image = torch.randint(90, 160, (3, 16, 20), dtype=torch.uint8, generator=g)  # no value reaches 0 or 255
        torch.manual_seed(seed)
        expected = v2.ColorJitter(**options)(image)
        torch.manual_seed(seed)
        found = ColorJitter(**options)(image)
        assert (found.int() - expected.int()).abs().max() <= 4
        changes.append((expected.int() - image.int()).abs().max())
    assert max(changes) > 8  # torchvision changes more than the tolerance, so the identity would not pass


def test_color_jitter_clamps_to_0_and_255_and_does_not_change_boxes():
    boxes = tv_tensors.BoundingBoxes([[12.0, 8.0, 30.0, 24.0]], format="XYXY", canvas_size=(60, 50))
    image = torch.full((3, 60, 50), 10, dtype=torch.uint8)
    image[:, 8:24, 12:30] = 250
    sample = {"image": tv_tensors.Image(image), "boxes": boxes.clone()}
    for seed in range(10):
        torch.manual_seed(seed)
        out = ColorJitter(brightness=(3.0, 3.0), contrast=(2.0, 2.0))(sample)
        assert type(out["image"]) is tv_tensors.Image and torch.equal(out["boxes"], boxes)
        assert out["image"].max() == 255 and out["image"].min() == 0
