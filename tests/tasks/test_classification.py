"""Classification: the metric, label smoothing and margins."""

import pytest
import torch

from allinone_ds.tasks.classification import ClassificationMetric
from tests.tasks.heads import build
from tests.tiny import SIZE, tiny_model


def test_top1_counts_images():
    metric = ClassificationMetric(3)
    metric.update([{"label": 0}, {"label": 1}, {"label": 1}], [{"label": 0}, {"label": 1}, {"label": 2}])
    metric.update([], [])
    metric.update([{"label": 2}], [{"label": 2}])
    assert metric.compute()["top1"] == pytest.approx(3 / 4)


def test_label_smoothing_spreads_a_fraction_over_all_classes_in_training_only():
    task = tiny_model({"cls": ("linear", {"label_smoothing": 0.3})}).tasks["cls"]
    torch.nn.init.normal_(task.classifier.weight)
    features, pixels = (torch.randn(4, 32, 8, 8),) * task.num_levels, torch.zeros(4, 3, *SIZE)
    labels = torch.tensor([0, 1, 2, 1])
    out = task(features, pixels, labels)
    logs = out.logits.detach().log_softmax(-1)
    plain, spread = -logs[range(4), labels].mean(), -logs.mean()
    torch.testing.assert_close(out.loss.detach(), 0.7 * plain + 0.3 * spread)
    torch.testing.assert_close(task.eval()(features, pixels, labels).loss.detach(), plain)


def test_the_margin_of_arcface_raises_the_loss_in_training_only():
    model, name, task = build("arcface")
    features, pixels = (torch.randn(4, 32, 8, 8),) * task.num_levels, torch.zeros(4, 3, *SIZE)
    labels = torch.tensor([0, 1, 2, 1])
    harder = task(features, pixels, labels).loss
    out = task.eval()(features, pixels, labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    assert harder > out.loss + 1
