"""Weightings that learn: each against the formula of its paper, by autograd or by hand; their state and names."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from allinone_ds import DBMTL, DWA, FAMO, GradNorm, RandomWeights, StepRecord, Uncertainty, Weighting
from allinone_ds.balance.options import TORCHJD, BalancerConfig, weighting_from_config
from allinone_ds.balance.weightings.gram import GramWeighting

TASKS = ("det", "seg", "cls")
NORMS = torch.tensor([2.0, 300.0, 0.5], dtype=torch.float64)


def record(losses: list[float], norms: Tensor = NORMS) -> StepRecord:
    return StepRecord(TASKS, torch.diag(norms**2), norms.float(), torch.tensor(losses))


def test_db_mtl_gives_log_loss_gradients_the_largest_norm() -> None:
    losses = torch.tensor([4.0, 100.0, 0.1], dtype=torch.float64)
    factors = DBMTL().factors(record(losses.tolist()))
    largest = (NORMS / losses).max()  # of the gradients of log(loss)
    torch.testing.assert_close(factors * NORMS, largest.expand(3), rtol=1e-4, atol=0)


def test_db_mtl_averages_norms() -> None:
    weighting = DBMTL(beta=0.9)
    weighting.factors(record([1.0, 1.0, 1.0]))
    factors = weighting.factors(record([1.0, 1.0, 1.0], NORMS * torch.tensor([10.0, 1.0, 1.0])))
    averaged = NORMS * torch.tensor([0.9 + 0.1 * 10, 1.0, 1.0])
    torch.testing.assert_close(factors, averaged.max() / averaged, rtol=1e-4, atol=0)


def test_gradnorm_follows_its_loss_by_autograd() -> None:
    weighting = GradNorm(alpha=1.5, lr=0.1)
    weights = torch.ones(3, dtype=torch.float64)
    first = torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)
    for losses in ([2.0, 3.0, 1.0], [1.0, 2.9, 0.5], [0.7, 2.8, 0.5]):
        ratios = torch.tensor(losses, dtype=torch.float64) / first
        free = weights.clone().requires_grad_()
        target = ((weights * NORMS).mean() * (ratios / ratios.mean()) ** 1.5).detach()
        (free * NORMS - target).abs().sum().backward()
        assert free.grad is not None
        weights = (weights - 0.1 * free.grad / NORMS.mean()).clamp(min=1e-6)
        weights *= 3 / weights.sum()
        torch.testing.assert_close(weighting.factors(record(losses)), weights, rtol=1e-4, atol=1e-6)


def test_uncertainty_follows_its_loss_by_autograd() -> None:
    weighting = Uncertainty(lr=0.2)
    s = torch.zeros(3, dtype=torch.float64)
    for losses in ([4.0, 1.0, 0.01], [3.0, 1.0, 0.02]):
        free = s.clone().requires_grad_()
        ((-free).exp() * torch.tensor(losses, dtype=torch.float64) + free).sum().backward()
        factors = torch.cat([weighting.factors(one(task, loss)) for task, loss in zip(TASKS, losses, strict=True)])
        torch.testing.assert_close(factors, (-s).exp(), rtol=1e-6, atol=0)
        assert free.grad is not None
        s = s - 0.2 * free.grad


def one(task: str, loss: float) -> StepRecord:
    return StepRecord((task,), torch.ones(1, 1), torch.ones(1), torch.tensor([loss]))


def test_a_loss_that_is_not_finite_is_not_learned_from() -> None:
    weighting = Uncertainty(lr=0.2)
    weighting.factors(one("det", 3.0))
    wanted = weighting.state_dict()
    weighting.factors(one("det", float("nan")))
    assert torch.equal(weighting.state_dict()["log_variance/det"], wanted["log_variance/det"])


def test_dwa_is_even_at_first_and_favours_what_falls_slowly() -> None:
    weighting = DWA(window=10)
    even = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(weighting.factors(record([5.0, 1.0, 1.0])), even, rtol=1e-5, atol=0)
    for _ in range(5):
        factors = weighting.factors(record([5.0, 0.2, 0.5]))
    assert factors[0] > factors[2] > factors[1]
    assert float(factors.sum()) == pytest.approx(3)


@pytest.mark.parametrize(
    "make", [lambda: DBMTL(0.5), GradNorm, Uncertainty, lambda: DWA(window=10), FAMO, RandomWeights]
)
def test_training_continues_from_a_saved_state(make) -> None:
    first: Weighting = make()
    seen = [record(losses) for losses in ([4.0, 2.0, 1.0], [3.0, 2.5, 0.5], [2.0, 2.0, 0.1], [1.0, 2.0, 0.1])]
    for step in seen[:2]:
        first.factors(step)
    second: Weighting = make()
    second.load_state_dict(first.state_dict())
    for step in seen[2:]:
        assert torch.equal(first.factors(step), second.factors(step))


def test_random_weights_are_positive_and_sum_to_the_number_of_tasks() -> None:
    weighting = RandomWeights(seed=3)
    a, b = (weighting.factors(record([1.0, 1.0, 1.0])) for _ in range(2))
    assert float(a.sum()) == pytest.approx(3) and float(a.min()) > 0 and not torch.equal(a, b)


def test_a_config_names_weighting_and_balancer_options() -> None:
    config = BalancerConfig(**{"name": "gradnorm", "alpha": 1, "norm": "delayed", "sketch_size": 4096})
    weighting, options = config.weighting(), config.options()
    assert isinstance(weighting, GradNorm) and weighting.alpha == 1.0
    assert options == {"norm": "delayed", "sketch_size": 4096}
    assert isinstance(weighting_from_config({"name": "mgda", "max_iters": 10}), GramWeighting)


@pytest.mark.parametrize("name", TORCHJD)
def test_every_named_method_weighs_a_gram_matrix(name: str) -> None:
    options = {"cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0}}.get(name, {})
    if name == "nash_mtl":
        options = {"n_tasks": 3}
    weights = weighting_from_config({"name": name, **options}).factors(record([1.0, 1.0, 1.0]))
    assert weights.shape == (3,) and bool(torch.isfinite(weights).all())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"name": "mgdaa"}, "did you mean 'mgda'"),
        ({"name": "gradnorm", "alfa": 1}, "did you mean 'alpha'"),
        ({"name": "gradnorm", "alpha": -1}, "alpha = -1"),
        ({"name": "db_mtl", "beta": 1.0}, "beta = 1.0"),
        ({"name": "cagrad"}, "needs the option c"),
        ({"name": "tbgc", "sketchsize": 3}, "did you mean 'sketch_size'"),
        ({"name": "tbgc", "norm": "exakt"}, "norm = 'exakt'; did you mean 'exact'"),
        ({"name": "tbgc", "norm": "delayed", "parallel": "tasks"}, "norm='delayed' with parallel='tasks'"),
    ],
)
def test_mistakes_are_named(config: dict, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        BalancerConfig(**config)


FALLING = ([4.0, 100.0, 0.1], [3.0, 99.0, 0.05], [2.0, 80.0, 0.06], [1.5, 79.0, 0.01])


def test_famo_follows_the_gradient_of_its_log_losses_and_adam() -> None:
    weighting = FAMO(lr=0.05, gamma=0.01)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.05, weight_decay=0.01)
    before = None
    for values in FALLING:
        losses = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        if before is not None:
            (w.grad,) = torch.autograd.grad(torch.softmax(w, 0) @ (before.log() - losses.detach().log()), w)
            adam.step()
        z = torch.softmax(w.detach(), 0)
        c = 1 / (z / losses.detach()).sum()
        (wanted,) = torch.autograd.grad(c * (z * losses.log()).sum(), losses)
        got = weighting.factors(record(values))
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
        assert float(got.sum()) == pytest.approx(1)
        before = losses.detach()


def test_famo_is_torchjd_s_when_its_second_evaluation_is_the_next_batch() -> None:
    theirs = pytest.importorskip("torchjd.scalarization").FAMO(3, lr=0.025, weight_decay=1e-3)
    ours = FAMO()
    for number, values in enumerate(FALLING):
        losses = torch.tensor(values, requires_grad=True)
        if number:
            theirs.update(losses.detach())
        theirs(losses).backward()
        torch.testing.assert_close(ours.factors(record(values)).float(), losses.grad, rtol=1e-4, atol=0)


def test_famo_pulls_harder_on_what_does_not_fall() -> None:
    weighting = FAMO(lr=0.1)
    for step in range(10):
        weights = weighting.factors(record([1.0, 0.9**step, 0.8**step])) * torch.tensor([1.0, 0.9**step, 0.8**step])
    assert weights[0] > weights[1] > weights[2], "z, in the paper's letters"


def _absent_db_mtl(kept: dict, norms: dict, losses: dict) -> dict:
    for t in norms:
        now = norms[t] / (losses[t] + 1e-6)
        kept[t] = 0.5 * kept.get(t, now) + 0.5 * now
    return {t: max(kept[s] for s in norms) / (kept[t] + 1e-6) / (losses[t] + 1e-6) for t in norms}


def _absent_gradnorm(kept: dict, norms: dict, losses: dict) -> dict:
    ratios, weights = {}, {}
    for t in norms:
        weights[t], first = kept.setdefault(t, [1.0, losses[t]])
        ratios[t] = losses[t] / (first + 1e-6)
    mean = sum(weights[t] * norms[t] for t in norms) / len(norms)
    usual, size = sum(ratios.values()) / len(norms), sum(norms.values()) / len(norms)
    moved = {}
    for t in norms:
        off = weights[t] * norms[t] - mean * (ratios[t] / (usual + 1e-6)) ** 1.5
        moved[t] = max(weights[t] - 0.025 * math.copysign(1, off) * norms[t] / (size + 1e-6), 1e-6)
    total, before = sum(moved.values()), sum(weights.values())
    for t in norms:
        kept[t][0] = moved[t] * before / total
    return {t: kept[t][0] for t in norms}


def _absent_uncertainty(kept: dict, norms: dict, losses: dict) -> dict:
    factors = {t: math.exp(-kept.get(t, 0.0)) for t in norms}
    kept.update({t: kept.get(t, 0.0) - 0.025 * (1 - factors[t] * losses[t]) for t in norms})
    return factors


def _absent_dwa(kept: dict, norms: dict, losses: dict) -> dict:
    powers = {}
    for t in norms:
        short, long = kept.get(t, (losses[t], losses[t]))
        kept[t] = short + (losses[t] - short) / 2, long + (losses[t] - long) / 20
        powers[t] = math.exp(kept[t][0] / (kept[t][1] + 1e-6) / 2.0)
    return {t: len(norms) * powers[t] / sum(powers.values()) for t in norms}


def _absent_famo(kept: dict, norms: dict, losses: dict) -> dict:
    """Of a task: w, its last loss, and Adam's mean, square and count."""
    seen = [t for t in norms if t in kept]
    total = sum(math.exp(kept[t][0]) for t in seen)
    z = {t: math.exp(kept[t][0]) / total for t in seen}
    delta = {t: math.log(kept[t][1] / losses[t]) for t in seen}
    mean_delta = sum(z[t] * delta[t] for t in seen)
    for t in seen:
        w, _, mean, square, count = kept[t]
        gradient = z[t] * (delta[t] - mean_delta) + 1e-3 * w
        mean, square, count = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2, count + 1
        w -= 0.025 * (mean / (1 - 0.9**count)) / (math.sqrt(square / (1 - 0.999**count)) + 1e-8)
        kept[t] = [w, losses[t], mean, square, count]
    for t in norms:
        kept.setdefault(t, [0.0, losses[t], 0.0, 0.0, 0])
    parts = {t: math.exp(kept[t][0]) / losses[t] for t in norms}
    return {t: part / sum(parts.values()) for t, part in parts.items()}


@pytest.mark.parametrize(
    ("weighting", "reference"),
    [
        (DBMTL(0.5), _absent_db_mtl),
        (GradNorm(), _absent_gradnorm),
        (Uncertainty(), _absent_uncertainty),
        (DWA(window=20), _absent_dwa),
        (FAMO(), _absent_famo),
    ],
)
def test_what_is_remembered_of_absent_tasks_stays_and_the_others_are_alone(weighting: Weighting, reference) -> None:
    """Sampled tasks, one of which comes later, against the formulas in numbers of Python."""
    generator, kept = random.Random(0), {}
    for step in range(60):
        tasks = generator.sample(["a", "b", "c", *(["d"] if step > 20 else [])], generator.choice((1, 2, 3)))
        norms = {task: generator.uniform(0.1, 5) for task in sorted(tasks)}
        losses = {task: generator.uniform(0.1, 3) for task in norms}
        gram = torch.tensor(list(norms.values()), dtype=torch.float64).square().diag()
        own = torch.tensor(list(losses.values()), dtype=torch.float64)
        found = weighting.factors(StepRecord(tuple(norms), gram, own, own))
        before = {task: kept[task] for task in kept if task not in norms}
        assert found.tolist() == pytest.approx(list(reference(kept, norms, losses).values()), rel=1e-9), (step, tasks)
        assert all(kept[task] == value for task, value in before.items())
