"""Test-time views: predictions return to the pixels of the image, and the number of forward passes is fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from allinone_ds.data.augmentation.transforms import eval_transform, stack_images
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.predictor import open_image
from allinone_ds.evaluation.views import predict_batch
from allinone_ds.tasks.segmentation import SegmentationOutput
from allinone_ds.tasks.test_time import TestTime, View, view_size, window_corners
from tests.tasks.heads import build
from tests.tiny import CLASSES, SIZE, samples, tiny_model

EVERY = {"scales": [0.75, 1.0, 2.0], "flip": True}


def test_windows_cover_the_view_and_share_a_third() -> None:
    assert window_corners((32, 32), (32, 32)) == [(0, 0)]
    assert window_corners((16, 70), (32, 32)) == [(0, 0), (0, 22), (0, 38)]
    for size in ((64, 64), (65, 100), (33, 32)):
        seen = torch.zeros(size)
        for top, left in window_corners(size, (32, 32)):
            assert top + 32 <= size[0] and left + 32 <= size[1]
            seen[top : top + 32, left : left + 32] += 1
        assert seen.min() >= 1


@pytest.mark.parametrize("mode", ["I;16", "P", "L", "RGBA", "RGB"])
def test_an_opened_picture_is_seen_as_its_file_is(mode: str, tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    picture = Image.fromarray(wide) if mode == "I;16" else Image.fromarray((wide >> 8).astype(np.uint8)).convert(mode)
    picture.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.mode == mode and torch.equal(open_image(opened), open_image(tmp_path / "x.png"))


@pytest.mark.parametrize("scales", [[], [0.0], [1.0, -0.5]])
def test_scales_must_be_above_zero(scales: list[float]) -> None:
    with pytest.raises(ValidationError, match="scales"):
        TestTime(scales=scales)


def test_views_are_whole_patches() -> None:
    assert view_size((32, 48), 0.75, 16) == (32, 32)
    assert view_size((32, 48), 2.0, 16) == (64, 96)
    assert view_size((32, 32), 0.1, 16) == (16, 16)


class PixelModel:
    """Class scores of a pixel from its colour alone: whatever the view, the same pixel has the same class."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, task: str, pixel_values: Tensor) -> SegmentationOutput:
        self.shapes.append(tuple(pixel_values.shape[-2:]))
        return SegmentationOutput(logits=4 * pixel_values)


def scene() -> list[dict[str, Any]]:
    """Red left of blue, in the lower half green: no symmetry a wrong flip could hide behind."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0, :32, :20] = image[2, :32, 20:] = image[1, 32:] = 255
    return [{"image": image, "path": "0.png", "index": 0}]


@pytest.mark.parametrize(
    "options", [{"flip": True}, {"scales": [2.0]}, {"scales": [2.0], "windows": True}, {**EVERY, "windows": True}]
)
def test_masks_of_views_fall_onto_each_other(options: dict[str, Any]) -> None:
    task = tiny_model().tasks["seg"]
    image = scene()[0]["image"]
    pixels = stack_images([eval_transform(SIZE)(sample) for sample in scene()])
    mask = predict_batch(PixelModel(), task, pixels, scene(), TestTime(**options))[0]["mask"]
    truth = torch.where(image[1] > 0, 1, torch.where(image[0] > 0, 0, 2))
    assert mask.shape == (64, 64) and mask.dtype == torch.uint8
    assert (mask == truth).float().mean() > 0.95  # all but the seams


def test_windows_see_parts_of_the_larger_view_at_the_network_size() -> None:
    task = tiny_model().tasks["seg"]
    model = PixelModel()
    predict_batch(model, task, torch.zeros(1, 3, *SIZE), scene(), TestTime(scales=[2.0], windows=True))
    assert model.shapes == [SIZE] * 9


def test_a_pixel_s_probabilities_are_the_mean_over_the_windows_that_see_it_and_over_the_views() -> None:
    """Noise in every window: a wrong weight at a border, or a window left out, turns some pixel's class."""
    task, K = tiny_model().tasks["seg"], len(CLASSES)
    torch.manual_seed(4)
    (H, W), (h, w) = size, window = (48, 70), SIZE
    corners = window_corners(size, window)
    assert len(corners) == 2 * 3
    views, total = [], torch.zeros(K, 50, 60)
    for flipped in (False, True):
        parts = [torch.randn(1, K, h // 2, w // 2) for _ in corners]  # a head of half the input's resolution
        views.append(View(size, flipped, [SegmentationOutput(logits=part) for part in parts], corners))
        sums, seen = torch.zeros(K, H, W), torch.zeros(H, W)
        for part, (top, left) in zip(parts, corners, strict=True):
            large = F.interpolate(part.softmax(1), size=window, mode="bilinear", align_corners=False)[0]
            for y in range(h):
                sums[:, top + y, left : left + w] += large[:, y]
                seen[top + y, left : left + w] += 1
        mean = sums / seen
        mean = mean[..., list(range(W - 1, -1, -1))] if flipped else mean
        total += F.interpolate(mean[None], size=(50, 60), mode="bilinear", align_corners=False)[0]
    mask = task.predict_views(views, [(50, 60)])[0]["mask"]
    sure = total.topk(2, dim=0).values.diff(dim=0).abs()[0] > 1e-5
    assert sure.float().mean() > 0.99 and set(mask.unique().tolist()) == set(range(K))
    assert torch.equal(mask[sure].long(), total.argmax(0)[sure])


class BoxModel(nn.Module):
    """Finds the bright rectangle of an image, in pixels of its input, and a weaker object in a corner."""

    image_size = SIZE
    max_detections = 2

    def forward(self, task: str, pixel_values: Tensor) -> Tensor:
        return pixel_values

    def postprocess(self, outputs: Tensor) -> list[dict[str, Tensor]]:
        found = []
        for pixels in outputs:
            y, x = torch.nonzero(pixels.amax(0) > 0.5, as_tuple=True)
            box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            width = pixels.shape[-1]
            boxes, scores, labels = [box], [0.5 + width / 1000], [1]
            if width == 64:
                boxes, scores, labels = [*boxes, torch.tensor([0.0, 0, 4, 4])], [*scores, 0.1], [*labels, 0]
            found.append({"boxes": torch.stack(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)})
        return found


def test_boxes_of_views_become_one_in_the_images_own_pixels() -> None:
    task = tiny_model().tasks["det"]
    model = BoxModel()
    task.detector = model
    image = torch.zeros(3, 128, 64, dtype=torch.uint8)
    image[:, 16:64, 8:24] = 255
    sample = {"image": image, "path": "0.png", "index": 0}
    found = predict_batch(model, task, torch.zeros(1, 3, *SIZE) - 2, [sample], TestTime(scales=[2.0], flip=True))[0]
    assert found["labels"].tolist() == [1, 0]  # one object of both views; of the weak one two corners, one too many
    model.max_detections = 3
    every = predict_batch(model, task, torch.zeros(1, 3, *SIZE) - 2, [sample], TestTime(scales=[2.0], flip=True))[0]
    assert every["labels"].tolist() == [1, 0, 0]  # though either view has found two
    torch.testing.assert_close(found["boxes"][0], torch.tensor([8.0, 16.0, 24.0, 64.0]), atol=1.01, rtol=0)
    assert task.image_size == SIZE and task.detector.image_size == SIZE


@pytest.mark.parametrize("head", ["fcos", "fcos-pyramid", "rf_detr", "light", "upernet", "mask2former"])
def test_every_head_predicts_several_views(head: str) -> None:
    model, name, task = build(head)
    model.eval()
    options = TestTime(**EVERY, windows=name == "seg")
    batch = task.collate(samples(2))
    predictions = predict_batch(model, task, batch["pixel_values"], samples(2), options)
    metric = task.metric()
    metric.update(predictions, samples(2))
    assert len(predictions) == 2 and task.main_metric in metric.compute()
    plain = predict_batch(model, task, batch["pixel_values"], samples(2))
    alone = predict_batch(model, task, batch["pixel_values"], samples(2), TestTime())
    for before, after in zip(plain, alone, strict=True):  # one view is no augmentation
        if name == "seg":
            assert (before["mask"] == after["mask"]).float().mean() > 0.98
        else:
            assert len(after["boxes"]) <= len(before["boxes"])
            best = slice(0, min(1, len(after["boxes"])))
            torch.testing.assert_close(before["scores"][best], after["scores"][best])


def test_a_rank_without_samples_runs_as_many_forwards() -> None:
    task = tiny_model().tasks["seg"]
    options = TestTime(**EVERY, windows=True)
    busy, idle = PixelModel(), PixelModel()
    predict_batch(busy, task, torch.zeros(1, 3, *SIZE), scene(), options)
    assert predict_batch(idle, task, torch.zeros(1, 3, *SIZE), [], options) == []
    assert busy.shapes == idle.shapes and len(idle.shapes) == 2 * (1 + 1 + 9)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("linear", {}, "cannot merge views"),
        ("fcos", {"windows": True}, "cannot merge windows, which are for kinds with a value per pixel"),
        ("rf_detr", {"scales": [0.25]}, "4 cells for 16 queries"),
    ],
)
def test_views_that_cannot_be_are_refused(head: str, options: dict[str, Any], message: str) -> None:
    model, name, task = build(head)
    with pytest.raises(ConfigError, match=message):
        predict_batch(model, task, torch.zeros(1, 3, *SIZE), samples(1), TestTime(**options))
