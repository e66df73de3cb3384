"""RegressionTask: metrics against torchmetrics, units, precision, missing numbers."""

import pytest
import torch
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from allinone_ds.tasks.vectors.regression import RegressionMetric, RegressionTask

NAN = float("nan")


def task(**options) -> RegressionTask:
    torch.manual_seed(0)
    return RegressionTask("it", ["age", "weight"], 8, 4, 1, (16, 16), **options)


def test_metrics_equal_torchmetrics_over_the_known_numbers():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(40, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 500.0]) + 7
    predicted = truth + torch.randn(40, 2, generator=generator) * torch.tensor([1.0, 300.0])
    truth[::5, 0] = NAN
    metric = RegressionMetric()
    metric.update([{"value": p} for p in predicted], [{"value": t} for t in truth])
    found, details = metric.compute(), metric.details(["age", "weight"])
    for name, reference in (
        ("r2", R2Score),
        ("rmse", lambda: MeanSquaredError(squared=False)),
        ("mae", MeanAbsoluteError),
    ):
        expected = []
        for k in range(2):
            known = ~truth[:, k].isnan()
            expected.append(float(reference()(predicted[known, k].float(), truth[known, k].float())))
        assert details["per_class"][name] == pytest.approx(expected, rel=1e-5)
        assert found[name] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert details["per_class"]["images"] == [32, 40]


def test_a_constant_truth_has_no_r2():
    metric = RegressionMetric()
    metric.update([{"value": torch.tensor([1.0])}] * 3, [{"value": torch.tensor([2.0])}] * 3)
    assert metric.compute() == {"r2": 0.0, "rmse": 1.0, "mae": 1.0}
    assert "1 of 1 columns have fewer than two different true values" in metric.details(["age"])["notes"][0]


def test_numbers_keep_their_digits_and_units_in_bfloat16():
    it = task().bfloat16()
    rows = [torch.tensor([1.7e9 + i, float(i) / 8], dtype=torch.float64) for i in range(5)]
    rows[4][1] = NAN
    note = it.use_samples([{"value": row} for row in rows])
    mean, deviation = it.moments
    assert mean.tolist() == [1.7e9 + 2, 1.5 / 8] and deviation[0].item() == pytest.approx(2**0.5, abs=1e-12)
    assert (
        note == "mean and standard deviation of 5 training images: age 1.7e+09 and 1.41421, weight 0.1875 and 0.139754"
    )
    outputs = it((torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16),), torch.zeros(1, 3, 16, 16))
    value = it.predict(outputs, [(16, 16)])[0]["value"]
    assert value.dtype == torch.float64 and value.tolist() == pytest.approx(mean.tolist(), abs=0.1)
    assert it.samples_to_count() == 0  # a loaded or resumed task keeps them


@pytest.mark.parametrize(("loss", "reference"), [("mse", torch.square), ("l1", torch.abs)])
def test_the_loss_is_a_mean_over_known_numbers_in_standard_deviations(loss, reference):
    it = task(loss=loss)
    rows = torch.tensor([[10.0, 100.0], [20.0, 300.0], [30.0, NAN]], dtype=torch.float64)
    it.use_samples([{"value": row} for row in rows])
    outputs = it((torch.randn(3, 8, 4, 4),), torch.zeros(3, 3, 16, 16), rows)
    target = (rows - torch.tensor([20.0, 200.0])) / torch.tensor([(200 / 3) ** 0.5, 100.0])
    known = ~rows.isnan()
    expected = reference(outputs.normalized.double() - target)[known].mean()
    torch.testing.assert_close(outputs.loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_without_numbers_the_task_says_nothing_and_keeps_its_units():
    it = task()
    assert it.use_samples([{"value": torch.zeros(0)}]) is None
    assert [m.tolist() for m in it.moments] == [[0, 0], [1, 1]]
