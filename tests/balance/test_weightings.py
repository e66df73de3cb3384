"""Properties of the weightings on dense gradients in float64; arXiv 2307.03465 and its relatives."""

from __future__ import annotations

import math

import pytest
import torch
import torchjd.aggregation
from torch import Tensor
from torchjd.aggregation import IMTLG, AlignedMTL

from allinone_ds import TBGC, GlobalClip, Static, StepRecord, Sum, TaskClip, Weighting, weighting_from_config
from allinone_ds.balance.weightings.gram import GramWeighting, as_weighting
from allinone_ds.errors import ConfigError

T, P = 3, 40


def jacobian(tasks: int = T, scale: float = 100.0, seed: int = 0) -> Tensor:
    """Task gradients (T, P) whose norms differ by up to 3,000x, all above 0.1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, P, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(0, math.log10(3000), tasks, dtype=torch.float64)[:, None] * scale / 100


def orthogonal(tasks: int = T) -> Tensor:
    rows = torch.linalg.qr(jacobian(tasks).T).Q.T
    return rows * torch.logspace(0, 3, tasks, dtype=torch.float64)[:, None]


def record(gradients: Tensor, heads: Tensor | None = None) -> StepRecord:
    gram = gradients @ gradients.T
    extra = 0 if heads is None else heads.square()
    names = tuple(f"task{i}" for i in range(len(gradients)))
    return StepRecord(names, gram, (gram.diagonal() + extra).sqrt(), torch.ones(len(gradients), dtype=torch.float64))


def update(weighting: Weighting, gradients: Tensor) -> Tensor:
    """The summed backbone gradient, (P,)."""
    return weighting.factors(record(gradients)) @ gradients


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("seed", range(5))
def test_two_tasks_give_imtlg_direction(seed: int) -> None:
    gradients = jacobian(2, seed=seed)
    assert cosine(update(TBGC(0.1), gradients), IMTLG()(gradients)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_orthogonal_tasks_give_imtlg_and_aligned_mtl_direction(tasks: int) -> None:
    gradients = orthogonal(tasks)
    got = update(TBGC(0.1), gradients)
    assert cosine(got, IMTLG()(gradients)) == pytest.approx(1, abs=1e-5)
    assert cosine(got, AlignedMTL()(gradients)) == pytest.approx(1, abs=1e-5)
    assert float(got.norm()) == pytest.approx(math.sqrt(tasks) * 0.1, rel=1e-4)


@pytest.mark.parametrize("factor", [1e-1, 3.0, 1e4])
def test_a_task_loss_times_a_number_changes_nothing(factor: float) -> None:
    gradients = jacobian()
    scaled = gradients.clone()
    scaled[1] *= factor
    torch.testing.assert_close(update(TBGC(0.1), gradients), update(TBGC(0.1), scaled), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_update_norm_is_bounded_by_tasks_times_tau(seed: int) -> None:
    assert float(update(TBGC(0.1), jacobian(5, seed=seed)).norm()) <= 5 * 0.1


def test_norm_below_tau_is_left_alone_and_zero_stays_zero() -> None:
    gradients = jacobian()
    gradients[0] *= 0.05 / gradients[0].norm()
    gradients[2] = 0
    factors = TBGC(0.1).factors(record(gradients))
    assert factors[0] == 1 and factors[1] < 1
    assert (factors[2] * gradients[2]).abs().max() == 0
    always = TBGC(0.1, rescale="always").factors(record(gradients))
    assert float(always[0]) == pytest.approx(2, rel=1e-3), "two-sided rescaling enlarges"
    assert (always[2] * gradients[2]).abs().max() == 0


def test_infinite_tau_is_the_plain_sum() -> None:
    gradients = jacobian()
    for weighting in (TBGC(math.inf), TaskClip(math.inf), Sum()):
        torch.testing.assert_close(update(weighting, gradients), gradients.sum(0))
    assert GlobalClip(math.inf).sum_factor(gradients.sum(0).norm()) == 1


@pytest.mark.parametrize("target", ["max", "mean", "median", "min"])
def test_relative_target_gives_every_task_that_norm(target: str) -> None:
    gradients = jacobian()
    norms = gradients.norm(dim=1)
    wanted = {"max": norms.max(), "mean": norms.mean(), "median": norms.median(), "min": norms.min()}[target]
    weighting = TBGC(target=target, rescale="always")
    got = weighting.factors(record(gradients)) * norms
    torch.testing.assert_close(got, wanted.expand(T), rtol=1e-5, atol=0)
    assert not weighting.streams and TBGC(0.1).streams


def test_task_clip_counts_the_head_and_tbgc_does_not() -> None:
    gradients, heads = jacobian(), torch.full((T,), 1e6, dtype=torch.float64)
    plain, with_heads = record(gradients), record(gradients, heads)
    torch.testing.assert_close(TBGC(0.1).factors(plain), TBGC(0.1).factors(with_heads))
    assert (TaskClip(0.1).factors(with_heads) < TaskClip(0.1).factors(plain) / 10).all()


def test_permuting_tasks_permutes_factors() -> None:
    gradients, order = jacobian(), torch.tensor([2, 0, 1])
    for weighting in (TBGC(0.1), TBGC(target="mean"), TaskClip(0.1), Sum()):
        factors = weighting.factors(record(gradients))
        torch.testing.assert_close(weighting.factors(record(gradients[order])), factors[order])


def test_static_weights_scale_each_task_by_name() -> None:
    gradients = jacobian()
    weighting = weighting_from_config({"name": "static", "weights": {"task2": 0.5, "task0": 3, "task1": 1}})
    wanted = torch.tensor([3, 1, 0.5], dtype=torch.float64) @ gradients
    torch.testing.assert_close(update(weighting, gradients), wanted)
    assert weighting.streams and weighting.heads == "same"
    weighting.check_tasks(("task0", "task1", "task2"))
    with pytest.raises(ValueError, match="no weight for task 'task3'"):
        weighting.check_tasks(("task0", "task1", "task2", "task3"))
    with pytest.raises(ValueError, match="unknown task 'task2'; did you mean 'task"):
        weighting.check_tasks(("task0", "task1"))


def test_an_aggregator_of_torchjd_is_refused() -> None:
    with pytest.raises(TypeError, match="pass its weighting of Gram matrices: torchjd.aggregation.UPGradWeighting"):
        as_weighting(torchjd.aggregation.UPGrad())
    assert isinstance(as_weighting(torchjd.aggregation.UPGradWeighting()), Weighting)


def test_callable_on_a_gram_matrix_is_a_weighting() -> None:
    weighting = as_weighting(lambda gram: gram.diagonal().rsqrt())
    assert isinstance(weighting, GramWeighting) and weighting.heads == "none"
    assert float(update(weighting, orthogonal()).norm()) == pytest.approx(math.sqrt(T))
    with pytest.raises(ValueError, match=r"returns a tensor of shape \(3,\)"):
        as_weighting(lambda gram: gram).factors(record(jacobian()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TBGC(0), "max_norm = 0"),
        (lambda: TBGC(target="maximum"), "did you mean 'max'"),
        (lambda: TBGC(rescale="clipp"), "did you mean 'clip'"),
        (lambda: TBGC(heads="some"), "heads = 'some'"),
        (lambda: TBGC(math.inf, rescale="always"), "finite target"),
        (lambda: Static({}), "a finite number above 0 for every task"),
        (lambda: Static({"det": 1, "seg": 0}), "'seg': 0"),
        (lambda: weighting_from_config({"name": "static"}), "weights"),
        (lambda: weighting_from_config({"name": "static", "weights": [1, 2]}), "valid dictionary"),
        (lambda: weighting_from_config({"name": "tbcg"}), "did you mean 'tbgc'"),
        (lambda: weighting_from_config({"name": "sum", "max_norm": 1}), "'sum' has no such option"),
        (lambda: weighting_from_config({"name": "tbgc", "maxnorm": 1}), "did you mean 'max_norm'"),
    ],
)
def test_wrong_options_name_what_is_allowed(make, message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make()


def test_wrong_weighting_names_what_is_allowed() -> None:
    with pytest.raises(TypeError, match=r"pass an instance: TBGC\(\)"):
        as_weighting(TBGC)
    with pytest.raises(TypeError, match="callable"):
        as_weighting("tbgc")


def test_a_target_that_never_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="never scales"):
        TBGC(target="max")
    with pytest.raises(ConfigError, match="never scales"):
        weighting_from_config({"name": "tbgc", "target": "max"})


def test_config_names_build_the_ladder() -> None:
    names = {"sum": Sum, "global_clip": GlobalClip, "task_clip": TaskClip, "tbgc": TBGC}
    assert all(type(weighting_from_config({"name": name})) is kind for name, kind in names.items())
    assert repr(weighting_from_config({"name": "tbgc", "max_norm": 0.2})).startswith("TBGC(max_norm=0.2")
