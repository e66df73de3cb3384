"""Boxes and masks follow the pixels through large-scale jitter, mosaic and mixup; the reference is the image itself."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from allinone_ds.data.augmentation.geometry import LargeScaleJitter, MixUp, Mosaic, sanitize_boxes
from allinone_ds.data.augmentation.transforms import train_transform
from allinone_ds.run_config.yaml_files import read_yaml

# Far from each other, from black (background) and from grey (fill), so that a colour identifies an object.
COLORS = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 6, 1.0, 1.0)) for i in range(6)]
exact = settings(max_examples=40, deadline=None, derandomize=True, database=None)

sides = st.integers(17, 61)
seeds = st.integers(0, 2**31)
scales = st.sampled_from([(0.3, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 3.0)])


@st.composite
def pictures(draw, label: int | None = None):
    """Images of random size with at most one filled box on black, sometimes at a border or of full height."""
    height, width = draw(sides), draw(sides)
    if not draw(st.booleans()) and label is None:
        return picture(height, width, [])
    x1 = draw(st.sampled_from([0, width // 3, width - 9]))
    y1 = draw(st.sampled_from([0, height // 3, height - 9]))
    x2 = draw(st.sampled_from([x1 + 8, width]))
    y2 = draw(st.sampled_from([y1 + 8, height]))
    return picture(height, width, [(x1, y1, x2, y2, label or 0)])


def picture(height: int, width: int, boxes: list[tuple[int, int, int, int, int]]) -> dict:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2, label in boxes:
        image[:, y1:y2, x1:x2] = torch.tensor(COLORS[label], dtype=torch.uint8).view(3, 1, 1)
    corners = torch.tensor([b[:4] for b in boxes], dtype=torch.float32).reshape(-1, 4)
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([b[4] for b in boxes], dtype=torch.long),
        "iscrowd": torch.tensor([b[4] % 2 == 1 for b in boxes], dtype=torch.bool),
    }


def extent(image: torch.Tensor, label: int, strength: float = 1.0) -> list[float] | None:
    """XYXY of the pixels that are nearer to the object's colour than to black."""
    color = torch.tensor(COLORS[label]).view(3, 1, 1) * strength
    near = ((image.float() - color).abs() <= 0.5 * 255 * strength).all(dim=0)
    ys, xs = torch.where(near)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(xs) else None


def agree(out: dict, slack: float = 1.01) -> None:
    """Every box surrounds the pixels of its colour, and every object of at least 3 x 3 pixels has its box."""
    image = out["image"].as_subclass(torch.Tensor)
    boxes, labels = out["boxes"].as_subclass(torch.Tensor), out["labels"].tolist()
    assert len(boxes) == len(labels) == len(out["iscrowd"])
    assert out["iscrowd"].tolist() == [label % 2 == 1 for label in labels]
    assert tuple(out["boxes"].canvas_size) == tuple(image.shape[-2:])
    for label in set(labels):
        seen = extent(image, label)
        mine = boxes[[n for n, k in enumerate(labels) if k == label]]
        around = torch.cat([mine[:, :2].amin(0), mine[:, 2:].amax(0)])
        if ((mine[:, 2:] - mine[:, :2]) >= 3).all():
            assert seen is not None
            assert (around - torch.tensor(seen)).abs().max() <= slack, (label, around, seen)
    for label in range(len(COLORS)):
        seen = extent(image, label)
        if seen and seen[2] - seen[0] >= 3 and seen[3] - seen[1] >= 3:
            assert label in labels, f"object {label} at {seen} has no box"


@exact
@given(pictures(), sides, sides, scales, seeds)
def test_large_scale_jitter_keeps_boxes(sample, height, width, scale, seed):
    torch.manual_seed(seed)
    out = LargeScaleJitter((height, width), scale)(sample)
    assert out["image"].shape == (3, height, width)
    sanitize_boxes(out, (height, width))
    largest = scale[1] * max(height / sample["image"].shape[-2], width / sample["image"].shape[-1])
    agree(out, slack=max(1.01, 0.6 * largest))  # a pixel of the source may cover several


@exact
@given(st.tuples(*(pictures(label) for label in (1, 2, 3, 4))), st.integers(20, 50), st.integers(20, 50), seeds)
def test_mosaic_keeps_the_visible_part_of_every_box(samples, height, width, seed):
    torch.manual_seed(seed)
    further = iter(samples[1:])
    before = [{key: value.clone() for key, value in sample.items()} for sample in samples]
    out = Mosaic((height, width))(samples[0], lambda: next(further))
    assert out["image"].shape == (3, 2 * height, 2 * width)
    agree(out, slack=max(1.01, 0.6 * max(height, width) / 17))
    for sample, old in zip(samples, before, strict=True):  # samples may come from a cache
        assert all(torch.equal(sample[key], old[key]) for key in old)


@exact
@given(pictures(0), pictures(2), scales, seeds)
def test_mixup_keeps_the_boxes_of_both(first, second, scale, seed):
    torch.manual_seed(seed)
    out = MixUp(scale=scale, fill=0)(first, lambda: second)
    image = out["image"].as_subclass(torch.Tensor)
    assert image.shape == first["image"].shape
    assert torch.equal(out["boxes"][0].as_subclass(torch.Tensor), first["boxes"][0].as_subclass(torch.Tensor))
    ratio = max(a / b for a, b in zip(image.shape[-2:], second["image"].shape[-2:], strict=True))
    for channel, label in ((0, 0), (1, 2)):  # red and green
        ys, xs = torch.where(image[channel] > 63)
        mine = out["boxes"].as_subclass(torch.Tensor)[out["labels"] == label]
        assert len(mine) <= 1
        if len(mine) and (mine[0, 2:] - mine[0, :2]).min() >= 3:
            seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (mine[0] - seen).abs().max() <= max(1.01, 0.6 * ratio * scale[1])
        if len(xs) and min(xs.max() - xs.min(), ys.max() - ys.min()) >= 3:
            assert len(mine) == 1


def test_images_without_boxes_are_combined_with_others():
    torch.manual_seed(0)
    empty, full = picture(31, 20, []), picture(20, 31, [(4, 4, 16, 16, 3)])
    none = MixUp()(Mosaic((24, 24))(empty, lambda: empty), lambda: empty)
    assert none["boxes"].shape == (0, 4) and none["labels"].dtype == torch.long
    assert len(MixUp(scale=(1.0, 1.0))(empty, lambda: full)["boxes"]) == 1
    assert len(Mosaic((24, 24), center=(1.0, 1.0))(empty, lambda: full)["boxes"]) == 3


def label_map(height: int, width: int, classes: list[int]) -> dict:
    """Stripes, one per class and one of 255, mirrored in the lower half; colours identify classes, white is 255."""
    mask = torch.full((height, width), 255, dtype=torch.uint8)
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    for n, k in enumerate(classes):
        stripe = slice(n * width // (len(classes) + 1), (n + 1) * width // (len(classes) + 1))
        mask[:, stripe] = k
        image[:, :, stripe] = torch.tensor(COLORS[k], dtype=torch.uint8).view(3, 1, 1)
    for pixels in (mask, image):
        pixels[..., height // 2 :, :] = pixels[..., height // 2 :, :].flip(-1)
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}


def classes_agree(out: dict, classes: set[int], fill: int) -> None:
    """Away from the edges, pixels have the class of their colour, and uncovered ones are 255."""
    image, mask = out["image"].as_subclass(torch.Tensor).float(), out["mask"].as_subclass(torch.Tensor)
    assert mask.dtype == torch.uint8 and mask.shape == image.shape[-2:]
    assert set(mask.unique().tolist()) <= classes | {255}
    palette = torch.tensor([*COLORS, (255, 255, 255), (fill, fill, fill)]).float()  # 6: ignored, 7: uncovered
    gaps = (image.permute(1, 2, 0)[:, :, None] - palette).abs().amax(-1)  # (H, W, 8)
    shown = torch.where(gaps.amin(-1) < 2, gaps.argmin(-1), -1)  # -1: a blend of two colours at an edge
    for k in range(len(COLORS)):
        assert set(mask[shown == k].unique().tolist()) <= {k}
    for without in (6, 7):
        assert set(mask[shown == without].unique().tolist()) <= {255}
    assert (shown >= 0).float().mean() > 0.4  # the colour identifies the class of most pixels


@exact
@given(st.integers(30, 61), st.integers(40, 61), sides, sides, scales, seeds)
def test_large_scale_jitter_keeps_classes(height, width, out_height, out_width, scale, seed):
    torch.manual_seed(seed)
    out = LargeScaleJitter((out_height, out_width), scale, fill=90)(label_map(height, width, [0, 3]))
    assert out["image"].shape == (3, out_height, out_width)
    classes_agree(out, {0, 3}, 90)


@exact
@given(st.integers(40, 61), st.integers(40, 61), st.integers(33, 50), st.integers(33, 50), seeds)
def test_mosaic_keeps_classes(height, width, out_height, out_width, seed):
    torch.manual_seed(seed)
    further = iter([label_map(51, 40, [2]), label_map(40, 51, [4, 5]), label_map(45, 45, [])])
    out = Mosaic((out_height, out_width), fill=90)(label_map(height, width, [0, 1]), lambda: next(further))
    assert out["image"].shape == (3, 2 * out_height, 2 * out_width)
    classes_agree(out, {0, 1, 2, 4, 5}, 90)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_factor_is_relative_to_the_plain_resize(scale):
    sample = picture(40, 80, [(30, 15, 50, 25, 0)])
    plain = train_transform([], (60, 60))(sample)["boxes"][0]
    seen = []
    for seed in range(30):
        torch.manual_seed(seed)
        out = train_transform([{"LargeScaleJitter": {"scale": [scale, scale]}}], (60, 60))(sample)
        seen += [box[2:] - box[:2] for box in out["boxes"].as_subclass(torch.Tensor)]
    largest = torch.stack(seen).amax(0)  # boxes that are not cut
    expected = ((plain[2:] - plain[:2]) * scale).clamp(max=60).as_subclass(torch.Tensor)
    assert torch.allclose(largest, expected, atol=1.0)


def test_the_meeting_point_and_the_probability_of_mosaic():
    sample = picture(20, 20, [(0, 0, 20, 20, 0)])
    other = picture(20, 20, [(0, 0, 20, 20, 2)])
    fixed = Mosaic((20, 20), center=(1.0, 1.0))(sample, lambda: other)
    assert fixed["boxes"].tolist() == [[0, 0, 20, 20], [20, 0, 40, 20], [0, 20, 20, 40], [20, 20, 40, 40]]
    torch.manual_seed(0)
    joined = sum(Mosaic((20, 20), p=0.3)(sample, lambda: other)["image"].shape[-1] == 40 for _ in range(400))
    assert 0.3 * 400 - 30 < joined < 0.3 * 400 + 30
    points = set()
    for _ in range(200):
        boxes = Mosaic((20, 20))(sample, lambda: other)["boxes"].tolist()
        points.add((boxes[0][2], boxes[0][3]))
    xs = [x for x, _ in points]
    assert min(xs) == 10 and max(xs) == 30 and len(points) > 100


@pytest.mark.parametrize(
    ("task", "seed"), [(t, s) for t in ("detection", "segmentation", "classification") for s in range(6)]
)
def test_the_branches_of_the_package_give_valid_samples(task, seed):
    transform = train_transform(read_yaml(f"configs/augment/{task}.yaml"), (40, 56), task)
    rng = np.random.default_rng(seed)
    for branch in transform.branches:
        torch.manual_seed(seed)

        def sample():
            height, width = (int(side) for side in rng.integers(21, 90, 2))
            if task == "detection":
                return picture(height, width, [(2, 3, 18, 20, 1)] if rng.random() < 0.7 else [])
            if task == "segmentation":
                return label_map(height, width, [0, 1, 2])
            return {"image": picture(height, width, [])["image"], "label": 3}

        out = transform.only(branch)(sample(), sample)
        assert out["image"].shape == (3, 40, 56) and out["image"].dtype == torch.uint8
        if task == "detection":
            boxes = out["boxes"].as_subclass(torch.Tensor)
            assert len(boxes) == len(out["labels"]) == len(out["iscrowd"])
            assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all() and (boxes >= 0).all()
            assert (boxes <= torch.tensor([56, 40, 56, 40])).all()
        if task == "segmentation":
            assert out["mask"].shape == (40, 56) and set(out["mask"].unique().tolist()) <= {0, 1, 2, 255}
        if task == "classification":
            assert out["label"] == 3
