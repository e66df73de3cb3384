"""The metrics of depth, normals, edges and saliency against references that were written down by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torchmetrics.classification import BinaryFBetaScore
from torchmetrics.regression import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError
from torchvision import tv_tensors

from allinone_ds.data.dense_maps import DenseMap, EdgeMap, NormalMap
from allinone_ds.tasks.dense.depth import DepthMetric
from allinone_ds.tasks.dense.edges import EdgesMetric, edge_counts
from allinone_ds.tasks.dense.normals import NormalsMetric
from allinone_ds.tasks.dense.saliency import SaliencyMetric

SIZES = [(20, 30), (7, 11), (16, 16)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def test_depth_equals_torchmetrics_over_all_valid_pixels() -> None:
    g = generator()
    metric, references = (
        DepthMetric(),
        (MeanSquaredError(squared=False), MeanAbsoluteError(), MeanAbsolutePercentageError()),
    )
    found, true = [], []
    for size in SIZES:
        depth = torch.rand(size, generator=g) * 9 + 0.5
        depth[torch.rand(size, generator=g) < 0.3] = math.nan
        predicted = torch.rand(size, generator=g) * 9 + 0.5
        metric.update([{"depth": predicted}], [{"depth": DenseMap(depth)}])
        found.append(predicted[depth.isfinite()].double())
        true.append(depth[depth.isfinite()].double())
    values, predicted, depth = metric.compute(), torch.cat(found), torch.cat(true)
    for name, reference in zip(("rmse", "mae", "abs_rel"), references, strict=True):
        assert values[name] == pytest.approx(float(reference.set_dtype(torch.float64)(predicted, depth)), rel=1e-6)
    factor = torch.maximum(predicted / depth, depth / predicted)
    for power in (1, 2, 3):
        assert values[f"delta{power}"] == float((factor < 1.25**power).double().mean())
    perfect = DepthMetric()
    perfect.update([{"depth": torch.ones(2, 2)}], [{"depth": DenseMap(torch.ones(2, 2))}])
    assert perfect.compute() == {**dict.fromkeys(("delta1", "delta2", "delta3"), 1.0),
                                 **dict.fromkeys(("rmse", "abs_rel", "mae"), 0.0)}  # fmt: skip


def test_angles_equal_those_of_the_arc_cosine() -> None:
    g = generator()
    metric, angles = NormalsMetric(), []
    for size in SIZES:
        true, predicted = torch.randn(3, *size, generator=g), torch.randn(3, *size, generator=g)
        predicted = true + 0.4 * predicted
        true = true / true.norm(dim=0)
        true[:, torch.rand(size, generator=g) < 0.3] = math.nan
        metric.update([{"normals": predicted}], [{"normals": NormalMap(true)}])
        cosine = (predicted.double() * true.double()).sum(0) / predicted.double().norm(dim=0)
        angles.append(np.rad2deg(np.arccos(cosine[cosine.isfinite()].clamp(-1, 1).numpy())))
    every, values = np.concatenate(angles), metric.compute()
    assert values["mean_angle"] == pytest.approx(every.mean(), abs=1e-4)
    assert values["median_angle"] == pytest.approx(np.sort(every)[(len(every) - 1) // 2], abs=0.0051)
    for name, limit in {"within_11": 11.25, "within_22": 22.5, "within_30": 30}.items():
        assert values[name] == (every < limit).mean()


@pytest.mark.parametrize("degrees", [0.0, 0.001, 45.0, 179.9, 180.0])
def test_small_and_large_angles_are_exact(degrees: float) -> None:
    turned = torch.tensor([math.sin(math.radians(degrees)), 0.0, math.cos(math.radians(degrees))], dtype=torch.float64)
    metric = NormalsMetric()
    metric.update(
        [{"normals": turned.view(3, 1, 1)}], [{"normals": NormalMap(torch.tensor([0, 0, 1.0]).view(3, 1, 1))}]
    )
    assert metric.compute()["mean_angle"] == pytest.approx(degrees, abs=1e-6)


def brute_force(found: np.ndarray, true: np.ndarray, threshold: float, tolerance: float) -> list[int]:
    limit = tolerance * math.hypot(*true.shape)
    predicted, edges = np.argwhere((found >= threshold) & (true != 255)), np.argwhere(true == 1)

    def near(points: np.ndarray, others: np.ndarray) -> int:
        if not len(points) or not len(others):
            return 0
        return int((cKDTree(others).query(points)[0] <= limit).sum())

    return [near(predicted, edges), len(predicted), near(edges, predicted), len(edges)]


@pytest.mark.parametrize("tolerance", [0.0, 0.03, 0.1])
def test_edges_match_within_the_tolerance(tolerance: float) -> None:
    g = np.random.default_rng(0)
    metric = EdgesMetric(threshold=0.35, tolerance=tolerance)
    total = {threshold: np.zeros(4, int) for threshold in [*(step / 40 for step in range(1, 40)), 0.35]}
    for size in SIZES:
        true = (g.random(size) < 0.1).astype(np.uint8)
        true[g.random(size) < 0.1] = 255
        found = np.clip(0.5 * (true == 1) + g.random(size) * 0.6, 0, 1).astype(np.float32)
        metric.update([{"edges": torch.from_numpy(found)}], [{"edges": EdgeMap(torch.from_numpy(true))}])
        for threshold in total:
            total[threshold] += brute_force(found, true, threshold, tolerance)

    def f_measure(counts: np.ndarray) -> float:
        precision, recall = counts[0] / max(counts[1], 1), counts[2] / max(counts[3], 1)
        return 2 * precision * recall / max(precision + recall, 1e-12)

    values, f_of = metric.compute(), {threshold: f_measure(counts) for threshold, counts in total.items()}
    assert values["ods"] == pytest.approx(max(f_of.values())) and values["f1"] == pytest.approx(f_of[0.35])
    assert values["precision"] == pytest.approx(total[0.35][0] / total[0.35][1])
    assert values["recall"] == pytest.approx(total[0.35][2] / total[0.35][3])
    best = metric.details()["metrics"]["ods_threshold"]
    assert f_of[best] == pytest.approx(values["ods"])
    if tolerance == 0:
        assert values["ods"] < 1


def test_a_shifted_edge_is_right_within_the_tolerance_only() -> None:
    true, found = torch.zeros(30, 40, dtype=torch.uint8), torch.zeros(30, 40)  # the diagonal has 50 pixels
    true[:, 20], found[:, 22] = 1, 1.0
    assert edge_counts(found, true, [0.5], 0.04).tolist() == [[30, 30, 30, 30]]
    assert edge_counts(found, true, [0.5], 0.039).tolist() == [[0, 30, 0, 30]]
    assert edge_counts(torch.zeros(30, 40), true, [0.5], 0.04).tolist() == [[0, 0, 0, 30]]
    assert edge_counts(found, torch.zeros_like(true), [0.5], 0.04).tolist() == [[0, 30, 0, 0]]


def test_predictions_on_ignored_pixels_do_not_find_an_edge() -> None:
    true, found = torch.zeros(30, 40, dtype=torch.uint8), torch.zeros(30, 40)
    true[5, 20], true[5, 21], found[5, 21] = 1, 255, 1.0
    assert edge_counts(found, true, [0.5], 0.04).tolist() == [[0, 0, 0, 1]]


def test_saliency_is_the_mean_of_the_images_at_the_best_threshold() -> None:
    g = generator()
    metric, of_image, errors = SaliencyMetric(), [], []
    for size in SIZES:
        true = (torch.rand(size, generator=g) < 0.3).to(torch.uint8)
        true[torch.rand(size, generator=g) < 0.1] = 255
        found = (0.5 * (true == 1) + 0.6 * torch.rand(size, generator=g)).clamp(0, 1)
        metric.update([{"saliency": found}], [{"saliency": tv_tensors.Mask(true)}])
        valid = true != 255
        errors.append(float((found[valid].double() - true[valid].double()).abs().mean()))
        of_threshold = []
        for step in range(256):
            score = BinaryFBetaScore(beta=0.3**0.5, threshold=0.5)
            of_threshold.append(float(score((found[valid] >= step / 255).float(), true[valid].long())))
        of_image.append(of_threshold)
    values = metric.compute()
    assert values["mae"] == pytest.approx(np.mean(errors), abs=1e-9)
    assert values["max_f"] == pytest.approx(np.mean(of_image, axis=0).max(), abs=1e-4)


def test_an_image_without_a_salient_pixel_counts_in_the_error_only() -> None:
    metric = SaliencyMetric()
    empty, full = torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.uint8)
    metric.update(
        [{"saliency": torch.full((4, 4), 0.25)}, {"saliency": torch.full((4, 4), 0.75)}],
        [{"saliency": tv_tensors.Mask(empty)}, {"saliency": tv_tensors.Mask(full)}],
    )
    assert metric.compute() == {"max_f": 1.0, "mae": 0.25}
