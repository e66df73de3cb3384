"""The losses of depth, normals, edges and saliency against loops over pixels in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.tasks.dense.tiny import LIGHT, dense_model

SHAPE = (3, 6, 8)  # B, H, W: at this size the logits are not interpolated


def cross_entropy(logit: float, target: bool) -> float:
    return math.log1p(math.exp(-logit)) if target else math.log1p(math.exp(logit))


def valid_pixels(labels: np.ndarray) -> list[list[tuple[int, int]]]:
    """The pixels of each image that have a value."""
    known = np.isfinite(labels).all(1) if labels.ndim == 4 else np.isfinite(labels) & (labels != 255)
    return [[(int(y), int(x)) for y, x in np.argwhere(of_image)] for of_image in known]


def depth(maps: np.ndarray, labels: np.ndarray, focus: float) -> float:
    total, pixels = 0.0, 0
    for i, places in enumerate(valid_pixels(labels)):
        gaps = [maps[i, 0, y, x] - math.log(labels[i, y, x]) for y, x in places]
        if gaps:
            total += len(gaps) * (np.mean(np.square(gaps)) - focus * np.mean(gaps) ** 2)
            pixels += len(gaps)
    return total / pixels


def absolute(maps: np.ndarray, labels: np.ndarray) -> float:
    errors = [
        abs(math.exp(maps[i, 0, y, x]) - labels[i, y, x]) for i, p in enumerate(valid_pixels(labels)) for y, x in p
    ]
    return float(np.mean(errors))


def angles(maps: np.ndarray, labels: np.ndarray) -> float:
    errors = []
    for i, places in enumerate(valid_pixels(labels)):
        for y, x in places:
            found, true = maps[i, :, y, x], labels[i, :, y, x]
            errors.append(1 - found @ true / np.linalg.norm(found))
    return float(np.mean(errors))


def binary(maps: np.ndarray, labels: np.ndarray, balanced: bool) -> float:
    total, pixels = 0.0, 0
    for i, places in enumerate(valid_pixels(labels)):
        ones = sum(labels[i, y, x] == 1 for y, x in places)
        for y, x in places:
            positive = labels[i, y, x] == 1
            of_other = (len(places) - ones if positive else ones) / len(places)
            total += (2 * of_other if balanced else 1) * cross_entropy(maps[i, 0, y, x], positive)
        pixels += len(places)
    return total / pixels


CASES = {
    "silog": ("depth", {}, lambda m, t: depth(m, t, 0.85)),
    "silog with all of the scale": ("depth", {"variance_focus": 0.0}, lambda m, t: depth(m, t, 0.0)),
    "l1": ("depth", {"loss": "l1"}, absolute),
    "normals": ("normals", {}, angles),
    "balanced edges": ("edges", {}, lambda m, t: binary(m, t, True)),
    "edges": ("edges", {"balanced": False}, lambda m, t: binary(m, t, False)),
    "saliency": ("saliency", {}, lambda m, t: binary(m, t, False)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_a_loop_over_the_valid_pixels(case: str) -> None:
    """With different numbers of valid pixels per image, one of which has none."""
    kind, options, reference = CASES[case]
    task = dense_model({"map": (kind, "light", {**LIGHT, **options})}).tasks["map"]
    generator = np.random.default_rng(0)
    missing = generator.random(SHAPE) < np.array([0.1, 0.6, 1.0])[:, None, None]
    maps = generator.normal(0.3, 1.0, (SHAPE[0], task.per_pixel, *SHAPE[1:]))
    if kind == "depth":
        labels = np.where(missing, np.nan, generator.uniform(0.5, 6.0, SHAPE))
    elif kind == "normals":
        vectors = generator.normal(size=(SHAPE[0], 3, *SHAPE[1:]))
        labels = np.where(missing[:, None], np.nan, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        labels[0, 1, 2, 3] = np.nan  # a vector of which one number is missing
    else:
        labels = np.where(missing, 255, generator.random(SHAPE) < 0.3).astype(np.uint8)
    given = torch.from_numpy(labels) if labels.dtype == np.uint8 else torch.from_numpy(labels).float()
    found = task.loss(torch.from_numpy(maps).float(), given)
    assert float(found) == pytest.approx(reference(maps, labels.astype(float)), rel=1e-5)
    assert task.count_labels(given) == sum(map(len, valid_pixels(labels.astype(float))))


@pytest.mark.parametrize(("kind", "off"), [("depth", "one"), ("edges", "even"), ("saliency", "even")])
def test_a_prior_can_be_switched_off(kind: str, off: str) -> None:
    options = {**LIGHT, "prior": off} | ({"balanced": False} if kind == "edges" else {})
    task = dense_model({"map": (kind, "light", options)}).tasks["map"]
    assert task.samples_to_count() == 0 and task.decoder.untrained
    del options["prior"]
    task = dense_model({"map": (kind, "light", options)}).tasks["map"]
    assert task.samples_to_count() == 64
    task.decoder.start_with(0.5)
    assert task.samples_to_count() == 0, "a trained bias stays"
