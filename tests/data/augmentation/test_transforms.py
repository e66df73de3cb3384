"""From a config's `augment` to transformed samples: boxes and masks follow the pixels, mistakes are named."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from allinone_ds.data.augmentation.catalog import NAMES
from allinone_ds.data.augmentation.transforms import MEAN, STD, eval_transform, normalize, stack_images, train_transform
from allinone_ds.errors import ConfigError

SIZE = (48, 64)  # H, W of the result


def scene(seed: int = 0, height: int = 60, width: int = 50):
    """A dark image with one white rectangle, its box and its mask (class 1)."""
    g = torch.Generator().manual_seed(seed)
    x1, y1 = torch.randint(2, 20, (2,), generator=g).tolist()
    w, h = torch.randint(12, 24, (2,), generator=g).tolist()
    image = torch.full((3, height, width), 10, dtype=torch.uint8)
    image[:, y1 : y1 + h, x1 : x1 + w] = 250
    mask = (image[0] == 250).to(torch.uint8)
    boxes = torch.tensor([[x1, y1, x1 + w, y1 + h]], dtype=torch.float32)
    base = {"image": tv_tensors.Image(image), "path": "image.png", "index": 3}
    box = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    detection = {**base, "boxes": box, "labels": torch.tensor([2]), "iscrowd": torch.tensor([True])}
    return {
        "detection": detection,
        "segmentation": {**base, "mask": tv_tensors.Mask(mask)},
        "classification": {**base, "label": 4},
    }


def extent(image: torch.Tensor) -> torch.Tensor:
    """XYXY (4,) of the bright pixels."""
    ys, xs = torch.where(image[0] > 128)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)


GEOMETRY = [
    [],
    ["RandomHorizontalFlip"],
    ["RandomVerticalFlip", {"RandomHorizontalFlip": {"p": 0.8}}],
    [{"RandomResizedCrop": {"scale": [0.5, 1.0]}}],
    [{"RandomZoomOut": {"side_range": [1.0, 1.5], "p": 1.0}}],
    [{"RandomAffine": {"degrees": 0, "translate": [0.2, 0.2], "scale": [0.8, 1.2]}}],
    [{"ScaleJitter": {"scale_range": [0.8, 1.2]}}, {"RandomCrop": {"pad_if_needed": True}}],
]


@pytest.mark.parametrize("augment", GEOMETRY, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_boxes_stay_on_their_pixels(augment, seed):
    torch.manual_seed(seed)
    out = train_transform(augment, SIZE)(scene(seed)["detection"])
    assert out["image"].shape == (3, *SIZE) and out["image"].dtype == torch.uint8
    if len(out["boxes"]):
        assert torch.allclose(out["boxes"][0].as_subclass(torch.Tensor), extent(out["image"]), atol=2.1)
    else:
        assert (out["image"] > 128).sum() < 3 * 2 * max(SIZE)  # at most a few pixels are left
    assert len(out["labels"]) == len(out["iscrowd"]) == len(out["boxes"])
    assert out["boxes"].canvas_size == SIZE


@pytest.mark.parametrize("augment", GEOMETRY, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_masks_stay_on_their_pixels_and_uncovered_ones_are_ignored(augment, seed):
    torch.manual_seed(seed)
    out = train_transform(augment, SIZE)(scene(seed)["segmentation"])
    mask, image = out["mask"].as_subclass(torch.Tensor), out["image"].as_subclass(torch.Tensor)
    assert mask.shape == SIZE and mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) <= {0, 1, 255}
    bright = image[0] > 128
    assert ((mask == 1) != bright).float().mean() < 0.06  # one pixel along the rectangle's edge
    assert bool((mask[image.sum(0) == 0] == 255).float().mean() > 0.9) or not (image.sum(0) == 0).any()


def test_uncovered_pixels_of_a_mask_become_255_and_of_an_image_the_fill():
    sample = scene()["segmentation"]
    augment = [{"RandomZoomOut": {"side_range": [2.0, 2.0], "p": 1.0, "fill": 77}}]
    out = train_transform(augment, SIZE)(sample)
    uncovered = out["mask"] == 255
    assert 0.6 < uncovered.float().mean() < 0.8
    assert (out["image"][:, uncovered] == 77).float().mean() > 0.95


def test_eval_is_a_plain_resize():
    for kind, sample in scene().items():
        out = eval_transform(SIZE)(sample)
        assert torch.equal(out["image"], F.resize(sample["image"], list(SIZE), antialias=True)), kind
        assert {k: out[k] for k in ("path", "index")} == {"path": "image.png", "index": 3}
    assert eval_transform(SIZE)(scene()["classification"])["label"] == 4


def test_all_tv_tensors_move_with_the_pixels():
    sample = scene()["segmentation"]
    image, corner = sample["image"], torch.tensor([[[3.0, 4.0]]])
    depth = tv_tensors.Mask(image[:1].float() / 2)
    points = tv_tensors.KeyPoints(corner, canvas_size=tuple(image.shape[-2:]))
    plain = {"image": image, "depth": depth, "points": points, "path": "image.png", "distance": torch.ones(1)}
    found = train_transform([{"RandomHorizontalFlip": {"p": 1.0}}], tuple(image.shape[-2:]))(plain)
    assert torch.equal(found["depth"], depth.flip(-1)) and torch.equal(found["image"], image.flip(-1))
    assert found["points"].flatten().tolist() == pytest.approx([image.shape[-1] - 3.0, 4.0], abs=1)
    assert found["path"] == "image.png" and found["distance"] is plain["distance"]
    assert eval_transform(SIZE)(plain)["depth"].shape == (1, *SIZE)


@pytest.mark.parametrize(
    ("kind", "key", "change"),
    [
        ("detection", "boxes", lambda value: value.as_subclass(torch.Tensor)),
        ("segmentation", "mask", lambda value: value.as_subclass(torch.Tensor)),
        ("classification", "image", lambda value: value.float() / 255),
    ],
)
def test_types_that_would_not_move_or_would_be_normalised_wrongly_are_refused(kind, key, change):
    sample = scene()[kind]
    with pytest.raises(TypeError, match=rf"sample\['{key}'\] is .* give"):
        eval_transform(SIZE)({**sample, key: change(sample[key])})


def test_the_input_sample_is_not_modified():
    for sample in scene().values():
        before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
        for seed in range(5):
            torch.manual_seed(seed)
            train_transform(["RandomHorizontalFlip", "ColorJitter", "RandomResizedCrop", "RandomErasing"], SIZE)(sample)
        assert all(torch.equal(v, before[k]) for k, v in sample.items() if isinstance(v, torch.Tensor))


def test_boxes_are_cut_and_dropped_as_torchvision_does():
    g = torch.Generator().manual_seed(0)
    boxes = torch.rand(200, 4, generator=g) * 90 - 15
    boxes[::3, 2:] = boxes[::3, :2] + torch.rand(67, 2, generator=g) * 3  # small ones
    size = (60, 50)
    sample = {
        "image": tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.arange(200),
        "iscrowd": torch.arange(200) % 2 == 0,
    }
    right = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=both)])(sample)
    mine = eval_transform(size)(sample)
    assert 20 < len(mine["labels"]) < 180
    for key in ("boxes", "labels", "iscrowd"):
        assert torch.equal(mine[key], right[key]), key


def both(sample):
    return sample["labels"], sample["iscrowd"]


def test_an_image_without_boxes_is_transformed():
    sample = scene()["detection"]
    sample["boxes"] = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(60, 50))
    sample["labels"], sample["iscrowd"] = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
    out = train_transform(["RandomHorizontalFlip", "RandomResizedCrop"], SIZE)(sample)
    assert out["boxes"].shape == (0, 4) and len(out["labels"]) == 0


def test_random_choice_applies_one_of_its_lists():
    augment = [
        {
            "RandomChoice": {
                "p": [0.5, 0.5],
                "transforms": [
                    ["RandomInvert", {"RandomInvert": {"p": 0.0}}],
                    {"RandomSolarize": {"threshold": 0}},
                ],
            }
        }
    ]
    transform = train_transform(augment, SIZE)
    assert isinstance(transform.branches["all"][0].transforms[0], v2.Compose)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        seen.add(int(transform(scene()["classification"])["image"].float().mean()))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (
            ["RandomHorizontalFlop"],
            r"augment\[0\]: .*'RandomHorizontalFlop'; did you mean 'RandomHorizontalFlip'",
        ),
        (["RandomInvert", {"ColorJiter": {}}], r"augment\[1\]: .*did you mean 'ColorJitter'"),
        (
            [{"ColorJitter": {"brightnes": 0.4}}],
            "ColorJitter has no option 'brightnes'; did you mean 'brightness'",
        ),
        ([{"ColorJitter": {"brightness": -1}}], r"augment\[0\]: ColorJitter cannot be constructed with"),
        ([{"RandomAffine": {}}], "RandomAffine cannot be constructed with.*degrees"),
        ([{"RandomApply": {"transforms": ["Nope"]}}], r"augment\[0\]\.transforms\[0\]"),
        ([{"RandomCrop": {}, "RandomInvert": {}}], "must be the name of a transform"),
        (["Normalize"], "no augmentation 'Normalize'"),
        (["CutMix"], "no augmentation 'CutMix'"),
        ([{"Resize": {"interpolation": "cubical"}}], "did you mean 'bicubic'"),
    ],
)
def test_a_mistake_is_named_with_its_location(augment, message):
    with pytest.raises(ConfigError, match=message):
        train_transform(augment, SIZE)


def test_every_allowed_name_gives_uint8_rgb_of_the_size():
    needs = {
        "RandomAffine": {"degrees": 10},
        "RandomRotation": {"degrees": 10},
        "Pad": {"padding": 3},
        "RandomPosterize": {"bits": 4},
        "RandomSolarize": {"threshold": 100},
        "RandomAdjustSharpness": {"sharpness_factor": 2},
        "GaussianBlur": {"kernel_size": 3},
        "JPEG": {"quality": 50},
        "RandomResize": {"min_size": 20, "max_size": 40},
        "RandomShortestSize": {"min_size": 20},
        "RandomApply": {"transforms": ["RandomInvert"]},
        "RandomChoice": {"transforms": ["RandomInvert"]},
        "RandomOrder": {"transforms": ["RandomInvert"]},
    }
    only_boxes = {"RandomIoUCrop", "ClampBoundingBoxes", "Mosaic", "MixUp"}
    for name in sorted(NAMES):
        torch.manual_seed(0)
        sample = scene()["detection" if name in only_boxes else "classification"]
        out = train_transform([{name: needs.get(name, {})}], SIZE)(sample, lambda: scene(1)["detection"])
        assert out["image"].shape == (3, *SIZE) and out["image"].dtype == torch.uint8, name


def test_normalize_equals_torchvision():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = F.normalize(images.float() / 255, list(MEAN), list(STD))
    assert torch.allclose(normalize(images), expected, atol=1e-5)
    stacked = stack_images([{"image": tv_tensors.Image(i)} for i in images])
    assert type(stacked) is torch.Tensor and stacked.dtype == torch.float32 and stacked.is_contiguous()
    assert torch.equal(stacked, normalize(images))


def test_pixel_transforms_do_not_change_boxes_and_masks():
    for sample in (scene()["detection"], scene()["segmentation"]):
        for augment in (["ColorJitter"], [{"RandomApply": {"transforms": [{"ColorJitter": {"hue": 0.1}}], "p": 1.0}}]):
            out = train_transform(augment, (60, 50))(sample)
            assert set(out) == set(sample)
            for key in {"boxes", "mask"} & set(sample):
                assert torch.equal(out[key], sample[key]) and type(out[key]) is type(sample[key])
