"""Segmentation: the metric against hand-made cases and one confusion matrix."""

import numpy as np
import pytest
import torch

from allinone_ds.tasks.segmentation import SegmentationMetric


def test_miou_is_the_mean_over_classes_seen_in_truth_or_prediction():
    metric = SegmentationMetric(4)
    truth = torch.tensor([[0, 0, 1, 1], [255, 255, 255, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1, 1], [3, 3, 3, 3]], dtype=torch.uint8)
    metric.update([{"mask": predicted}], [{"mask": truth}])
    # class 0: 1 / 2, class 1: 2 / 3; class 2 never appears, class 3 only where the truth is ignored
    assert metric.compute()["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert SegmentationMetric(4).compute() == {"miou": 0.0}


def test_miou_is_that_of_one_confusion_matrix_of_all_images():
    generator = np.random.default_rng(5)
    K, matrix = 7, np.zeros((7, 7), dtype=np.int64)
    metric = SegmentationMetric(K)
    for size in ((20, 30), (31, 17), (8, 8)):  # class 6 never appears; per-image means would differ
        truth = generator.choice([0, 0, 0, 1, 2, 3, 4, 5, 255], size).astype(np.uint8)
        predicted = np.where(generator.random(size) < 0.6, np.minimum(truth, 5), generator.integers(0, 6, size))
        valid = truth != 255
        np.add.at(matrix, (truth[valid], predicted[valid]), 1)
        metric.update([{"mask": torch.from_numpy(predicted.astype(np.uint8))}], [{"mask": torch.from_numpy(truth)}])
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    expected = float((matrix.diagonal()[union > 0] / union[union > 0]).mean())
    assert 0.1 < expected < 0.9
    assert metric.compute()["miou"] == pytest.approx(expected, abs=1e-6)
