"""AttributesTask: metrics against torchmetrics, prior, weights, partial labels."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import BinaryAveragePrecision, BinaryF1Score

from allinone_ds.tasks.frequencies import use_frequencies
from allinone_ds.tasks.vectors.attributes import AttributesMetric, AttributesTask

NAN = float("nan")


def task(**options) -> AttributesTask:
    torch.manual_seed(0)
    return AttributesTask("it", ["a", "b", "c"], 8, 4, 1, (16, 16), **options)


def entries(count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(count, 3, generator=generator) < torch.tensor([0.5, 0.2, 0.0])).float()
    truth[torch.rand(count, 3, generator=generator) < 0.3] = NAN
    scores = (0.3 * truth.nan_to_num(0.5) + 0.7 * torch.rand(count, 3, generator=generator)).clamp(0, 1)
    return scores, truth


def test_metrics_equal_torchmetrics_over_the_known_entries_of_each_attribute():
    scores, truth = entries()
    metric = AttributesMetric()
    metric.update([{"scores": s} for s in scores], [{"attributes": t} for t in truth])
    found, details = metric.compute(), metric.details(["a", "b", "c"])
    expected = {"ap": [], "f1": []}
    for k in range(2):
        known = ~truth[:, k].isnan()
        pair = scores[known, k], truth[known, k].long()
        expected["ap"].append(float(BinaryAveragePrecision()(*pair)))
        expected["f1"].append(float(BinaryF1Score()(*pair)))
    assert details["per_class"]["ap"] == pytest.approx([*expected["ap"], None])
    assert details["per_class"]["f1"][:2] == pytest.approx(expected["f1"], abs=1e-6)
    assert found == pytest.approx({"map": sum(expected["ap"]) / 2, "f1": sum(expected["f1"]) / 2}, abs=1e-6)
    assert "1 of 3 attributes are present in no image" in details["notes"][0]
    metric.reset()
    metric.update([{"scores": s} for s in scores], [{"attributes": torch.zeros(0)} for _ in truth])
    assert metric.compute() == {"map": 0.0, "f1": 0.0} and metric.details(["a", "b", "c"]) == {}


def test_an_attribute_without_any_entry_is_left_out():
    scores, truth = entries()
    metric = AttributesMetric()
    for columns, empty in (([0, 1, 2], 1), ([0], 0)):
        partly = truth[:, columns].clone()
        partly[:, empty] = NAN
        metric.reset()
        metric.update([{"scores": s} for s in scores[:, columns]], [{"attributes": t} for t in partly])
        found = metric.compute()
        known = ~truth[:, 0].isnan()
        expected = float(BinaryAveragePrecision()(scores[known, 0], truth[known, 0].long())) if empty else 0.0
        assert found["map"] == pytest.approx(expected)
        assert metric.details(["a", "b", "c"][: len(columns)])["per_class"]["ap"][empty] is None


@pytest.mark.parametrize("weight", [1.0, 3.0, "balanced"])
def test_the_loss_is_a_mean_over_known_entries(weight):
    it = task(positive_weight=weight)
    scores, truth = entries()
    use_frequencies({"it": it}, {"it": [{"attributes": row} for row in truth]})
    features = torch.randn(50, 8, 4, 4)
    outputs = it((features,), torch.zeros(50, 3, 16, 16), truth.double())
    known = ~truth.isnan()
    positive = torch.full((3,), weight) if isinstance(weight, float) else torch.tensor(it._weights)
    each = F.binary_cross_entropy_with_logits(
        outputs.logits.double()[known], truth.double()[known], pos_weight=positive.double().expand(50, 3)[known]
    )
    torch.testing.assert_close(outputs.loss.double(), each)
    if weight == "balanced":
        present = (truth == 1).sum(0) / known.sum(0)
        assert it._weights[:2] == pytest.approx(((1 - present) / present)[:2].tolist(), rel=0.01)


def test_probabilities_start_at_the_frequencies_unless_trained_or_uniform():
    _, truth = entries()
    data = {"it": [{"attributes": row} for row in truth]}
    rates = (truth == 1).sum(0) / (~truth.isnan()).sum(0)
    it = task()
    [note] = use_frequencies({"it": it}, data)
    torch.testing.assert_close(it.output.bias.sigmoid(), rates, atol=2e-3, rtol=0)
    assert "class frequencies of 50 training images: a" in note and "1 of 3 classes in none of them" in note
    before = it.output.bias.clone()
    assert use_frequencies({"it": it}, data) == [] and torch.equal(before, it.output.bias)
    uniform = task(prior="uniform")
    assert use_frequencies({"it": uniform}, data) == [] and not uniform.output.bias.any()


def test_labels_of_another_number_of_columns_are_refused():
    with pytest.raises(ValueError, match="labels of 2 columns, the task has 3"):
        task()((torch.randn(1, 8, 4, 4),), torch.zeros(1, 3, 16, 16), torch.zeros(1, 2))


def test_json_and_threshold():
    it = task()
    prediction = it.prediction(torch.tensor([0.9, 0.4, 0.6]))
    assert it.to_json(prediction)["present"] == ["a", "c"] and prediction["present"].tolist() == [True, False, True]
    certain = it.at_least(prediction, 0.7)
    assert certain["present"].tolist() == [True, False, False] and it.to_json(certain)["present"] == ["a"]
    assert it.sample_score(prediction, {"attributes": torch.tensor([1.0, NAN, 0.0])}) == pytest.approx(0.65)
    assert it.sample_score(prediction, {"attributes": torch.tensor([NAN] * 3)}) is None
    assert math.isclose(it.to_json(prediction)["scores"]["b"], 0.4, abs_tol=1e-4)
