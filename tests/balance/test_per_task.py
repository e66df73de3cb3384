"""Steps without some tasks: each weighting against torchjd's aggregator, or its own formula, of the tasks that ran."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torchjd.aggregation as torchjd
from torch import Tensor

from allinone_ds import DWA, FAMO, StepRecord, Weighting, weighting_from_config
from allinone_ds.balance.options import TORCHJD, WEIGHTINGS
from allinone_ds.balance.weightings.gram import GramWeighting, as_weighting
from allinone_ds.balance.weightings.per_task import OfJacobians
from allinone_ds.errors import ConfigError

TASKS = ("det", "seg", "cls", "depth")
T, P = 4, 30
PREFERENCE = [0.1, 0.4, 0.2, 0.3]
NEEDED = {"cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0}, "nash_mtl": {"n_tasks": T}}
SETS = [rows for k in (4, 3, 2, 1) for rows in itertools.combinations(range(T), k)]


def jacobian(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
    return torch.randn(T, P, generator=generator, dtype=torch.float64) * scales[:, None]


def record(gradients: Tensor, rows: tuple[int, ...], losses: Tensor | None = None) -> StepRecord:
    part = gradients[list(rows)]
    gram = part @ part.T
    losses = torch.ones(T) if losses is None else losses
    return StepRecord(tuple(TASKS[r] for r in rows), gram, gram.diagonal().sqrt(), losses[list(rows)])


def made(name: str, **options) -> Weighting:
    weighting = weighting_from_config({"name": name, **NEEDED.get(name, {}), **options})
    weighting.check_tasks(TASKS)
    return weighting


def update(weighting: Weighting, gradients: Tensor, rows: tuple[int, ...]) -> Tensor:
    return weighting.factors(record(gradients, rows)) @ gradients[list(rows)]


@pytest.mark.parametrize("name", sorted(set(TORCHJD) - {"nash_mtl", "gradvac"}))
@pytest.mark.parametrize("rows", SETS)
def test_a_method_without_state_sees_the_tasks_that_ran(name: str, rows: tuple[int, ...]) -> None:
    aggregator = getattr(torchjd, TORCHJD[name].removesuffix("Weighting"))(**NEEDED.get(name, {}))
    gradients = jacobian()
    torch.manual_seed(3)
    wanted = aggregator(gradients[list(rows)])
    torch.manual_seed(3)
    torch.testing.assert_close(update(made(name), gradients, rows), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "aligned_mtl"])
@pytest.mark.parametrize("rows", SETS)
def test_a_preference_follows_its_task(name: str, rows: tuple[int, ...]) -> None:
    """Restricted to the tasks that ran, with the same sum; as a list of a YAML file and as a float32 tensor."""
    gradients = jacobian()
    part = torch.tensor([PREFERENCE[r] for r in rows], dtype=torch.float64)
    aggregator = getattr(torchjd, TORCHJD[name].removesuffix("Weighting"))(part / part.sum())
    given = getattr(torchjd, TORCHJD[name])(torch.tensor(PREFERENCE))
    by_hand = as_weighting(given)
    by_hand.check_tasks(TASKS)
    for weighting in (made(name, pref_vector=PREFERENCE), by_hand):
        for _ in range(2):
            got = update(weighting, gradients, rows)
            torch.testing.assert_close(got, aggregator(gradients[list(rows)]), rtol=1e-4, atol=1e-5)
    assert torch.equal(given.pref_vector, torch.tensor(PREFERENCE)), "the user's object is as it was"


@pytest.mark.parametrize("rows", SETS)
def test_constant_weights_follow_their_task(rows: tuple[int, ...]) -> None:
    weighting = as_weighting(torchjd.ConstantWeighting(torch.tensor(PREFERENCE)))
    weighting.check_tasks(TASKS)
    wanted = torch.tensor([PREFERENCE[r] for r in rows], dtype=torch.float32).double()
    torch.testing.assert_close(weighting.factors(record(jacobian(), rows)), wanted)


def test_gradvac_keeps_the_targets_of_the_pairs_that_are_absent() -> None:
    """Each pair of tasks has a target cosine; a step of some tasks reads and moves the targets of their pairs only."""
    weighting = made("gradvac", beta=0.5)
    method = weighting.function
    weighting.factors(record(jacobian(0), (0, 1, 2, 3)))
    before = method._phi_t.clone()
    alone = torchjd.GradVacWeighting(beta=0.5)
    rows = [1, 3]
    alone(torch.eye(2, dtype=torch.float64))
    alone._phi_t = before[rows][:, rows].clone()
    gradients = jacobian(1)
    torch.manual_seed(0)
    wanted = alone(gradients[rows] @ gradients[rows].T)
    torch.manual_seed(0)
    torch.testing.assert_close(weighting.factors(record(gradients, (1, 3))), wanted)
    after = method._phi_t
    torch.testing.assert_close(after[rows][:, rows], alone._phi_t)
    others = torch.ones(T, T, dtype=torch.bool)
    others[1, 3] = others[3, 1] = others[1, 1] = others[3, 3] = False
    assert torch.equal(after[others], before[others]) and not torch.equal(after, before)
    weighting.factors(record(jacobian(2), (0, 1, 2, 3)))
    assert not torch.equal(method._phi_t[0, 1], torch.zeros(()).double()), "a full step goes on from them"


def test_gradvac_starts_with_a_step_of_some_tasks() -> None:
    weighting = made("gradvac")
    assert weighting.factors(record(jacobian(), (0, 2))).shape == (2,)
    assert weighting.factors(record(jacobian(), (0, 1, 2, 3))).shape == (T,)
    assert weighting.factors(record(jacobian(), (0, 1))).shape == (2,)


@pytest.mark.parametrize("every", [1, 3])
def test_nash_mtl_solves_the_game_of_the_tasks_that_ran(every: int) -> None:
    weighting = made("nash_mtl", update_weights_every=every, max_norm=0.0)
    full = weighting.factors(record(jacobian(0), (0, 1, 2, 3)))
    rows = [0, 2, 3]
    gradients = jacobian(1)
    alone = torchjd.NashMTL(n_tasks=3, max_norm=0.0).weighting
    alone.prvs_alpha = full[rows].numpy()
    got = weighting.factors(record(gradients, tuple(rows)))
    torch.testing.assert_close(got, alone(gradients[rows]), rtol=1e-4, atol=1e-6)
    kept = weighting.function.weighting.prvs_alpha
    assert kept[1] == pytest.approx(float(full[1])) and kept[rows] == pytest.approx(got.numpy())


def test_nash_mtl_of_one_task_is_its_clip() -> None:
    weighting = made("nash_mtl", max_norm=1.0)
    short, long = jacobian() * 1e-2, jacobian()
    assert float(weighting.factors(record(short, (1,)))) == 1.0
    assert float(update(weighting, long, (1,)).norm()) == pytest.approx(1.0)


def test_other_methods_of_torchjd_with_a_state_keep_it_too() -> None:
    weighting = as_weighting(torchjd.PCDWeighting())
    weighting.check_tasks(TASKS)
    for seed in range(3):
        weighting.factors(record(jacobian(seed), (0, 1, 2, 3)))
    before = weighting.function._sq_norm_ema.clone()
    weighting.factors(record(jacobian(9), (0, 1, 2)))
    after = weighting.function._sq_norm_ema
    assert after.shape == before.shape and float(after[3]) == float(before[3])
    assert not torch.equal(after[:3], before[:3])


@pytest.mark.parametrize("name", ["gradvac", "nash_mtl", "pcd", "upgrad"])
def test_training_goes_on_from_a_saved_state(name: str, tmp_path: Path) -> None:
    def fresh() -> Weighting:
        if name == "pcd":
            weighting = as_weighting(torchjd.PCDWeighting())
            weighting.check_tasks(TASKS)
            return weighting
        return made(name, **({"update_weights_every": 2} if name == "nash_mtl" else {}))

    sets = [(0, 1, 2, 3), (0, 2, 3), (0, 1, 2, 3), (1, 2), (0, 1, 2, 3), (0, 1, 2, 3)]
    for saved_after in (0, 1, 3):
        first, second = fresh(), fresh()
        for step in range(saved_after):
            first.factors(record(jacobian(step), sets[step]))
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for step in range(saved_after, len(sets)):
            results = []
            for weighting in (first, second):
                torch.manual_seed(step)
                results.append(weighting.factors(record(jacobian(step), sets[step])))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_function_that_cannot_serve_some_tasks_says_which_step_it_was() -> None:
    weighting = as_weighting(lambda gram: torch.ones(T, dtype=gram.dtype) @ gram)
    weighting.check_tasks(TASKS)
    with pytest.raises(RuntimeError) as raised:
        weighting.factors(record(jacobian(), (0, 2)))
    note = raised.value.__notes__[0]
    assert "(2, 2) Gram matrix of det, cls, in a step without seg, depth" in note


def restricted(name: str, losses: list[Tensor], sets: list[tuple[int, ...]]) -> list[Tensor]:
    """Factors of a method of this package by its formula, written with a full vector per task and indices."""
    count = torch.arange(T)
    logits, adam = torch.zeros(T).double(), torch.zeros(3, T).double()
    before, result = torch.full((T,), torch.nan).double(), []
    short, long = torch.full((T,), torch.nan).double(), torch.full((T,), torch.nan).double()
    for step, rows in enumerate(sets):
        index, loss = count[list(rows)], losses[step].double()
        if name == "dwa":  # window 10: spans of 1 and 10 steps
            for mean, span in ((short, 1.0), (long, 10.0)):
                old = torch.where(mean.isnan(), loss, mean)
                mean[index] = (old + (loss - old) / span)[index]
            result.append(len(index) * torch.softmax((short / long)[index] / 2, 0))
            continue
        if step:
            z = torch.softmax(logits[index], 0)
            delta = torch.where(before.isnan(), loss, before).log()[index] - loss[index].log()
            gradient = z * (delta - (z * delta).sum()) + 1e-3 * logits[index]
            adam[0, index] += 1
            adam[1, index] = 0.9 * adam[1, index] + 0.1 * gradient
            adam[2, index] = 0.999 * adam[2, index] + 0.001 * gradient**2
            mean, square = adam[1, index] / (1 - 0.9 ** adam[0, index]), adam[2, index] / (1 - 0.999 ** adam[0, index])
            logits[index] -= 0.025 * mean / (square.sqrt() + 1e-8)
        before[index] = loss[index]
        parts = torch.softmax(logits[index], 0) / loss[index]
        result.append(parts / parts.sum())
    return result


@pytest.mark.parametrize("make", [FAMO, lambda: DWA(window=10)])
def test_what_a_loss_weighting_learned_of_absent_tasks_stays(make) -> None:
    losses = [torch.rand(T, generator=torch.Generator().manual_seed(s)) + 0.5 for s in range(6)]
    sets = [(0, 1, 2, 3), (0, 2), (1, 2, 3), (3,), (0, 1, 2, 3), (1, 3)]
    weighting = make()
    wanted = restricted(type(weighting).__name__.lower(), losses, sets)
    for rows, loss, want in zip(sets, losses, wanted, strict=True):
        got = weighting.factors(record(jacobian(), rows, loss))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_gradnorm_keeps_the_sum_of_the_weights_that_a_step_moves() -> None:
    weighting = made("gradnorm", lr=0.1)
    first = weighting.factors(record(jacobian(), (0, 1, 2, 3)))
    alone = weighting.factors(record(jacobian(1), (2,)))
    torch.testing.assert_close(alone, first[2:3])
    pair = weighting.factors(record(jacobian(2), (0, 3)))
    torch.testing.assert_close(pair.sum(), first[0] + first[3])
    assert float(weighting.factors(record(jacobian(3), (0, 1, 2, 3))).sum()) == pytest.approx(T)


@pytest.mark.parametrize("name", [*WEIGHTINGS, *TORCHJD])
def test_every_name_serves_every_set_of_tasks(name: str) -> None:
    options = {"static": {"weights": dict(zip(TASKS, PREFERENCE, strict=True))}}.get(name, {})
    weighting = made(name, **options)
    if weighting.streams:
        return  # sees one task at a time in any case
    for rows in SETS:
        factors = weighting.factors(record(jacobian(), rows))
        assert factors.shape == (len(rows),) and bool(torch.isfinite(factors).all()), rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "upgrad", "pref_vector": [1, 2, 3]}, r"UPGradWeighting: pref_vector has 3 numbers, and there are 4"),
        ({"name": "dualproj", "pref_vector": [1]}, r"4 tasks \(det, seg, cls, depth\); give one number per task"),
        ({"name": "aligned_mtl", "pref_vector": [1, 2, 3, 4, 5]}, "AlignedMTLWeighting: pref_vector has 5"),
        ({"name": "nash_mtl", "n_tasks": 3}, "NashMTLWeighting: n_tasks = 3, and there are 4 tasks .*; set it to 4"),
    ],
)
def test_numbers_per_task_are_counted_when_the_tasks_are_known(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighting_from_config(options).check_tasks(TASKS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fairgrad"}, "'fairgrad' needs the option alpha, which has no default"),
        ({"name": "cagrad"}, "'cagrad' needs the option c"),
        ({"name": "nash_mtl"}, "'nash_mtl' needs the option n_tasks"),
        ({"name": "static"}, "'static' needs the option weights"),
        ({"name": "upgrad", "pref_vector": "a"}, "balancer.pref_vector = 'a'"),
        ({"name": "upgrad", "pref_vector": [[1, 2]]}, "balancer.pref_vector"),
    ],
)
def test_options_that_are_missing_or_no_vectors_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weighting_from_config(options)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (torchjd.NashMTL(n_tasks=3), r"weighting_from_config\(\{'name': 'nash_mtl'"),
        (torchjd.NashMTL(n_tasks=3).weighting, "NashMTLWeighting, which reads a Jacobian"),
        (torchjd.ExcessMTLWeighting(), "ExcessMTLWeighting, which reads a Jacobian"),
        (torchjd.TrimmedMean(1), "TrimmedMean has none"),
        (torchjd.ConFIG(), "ConFIG has none"),
    ],
)
def test_what_reads_a_jacobian_is_refused(weighting, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        as_weighting(weighting)


def test_what_reads_a_gram_matrix_or_its_size_is_accepted() -> None:
    for weighting in (torchjd.MeanWeighting(), torchjd.KrumWeighting(0), OfJacobians(torchjd.SumWeighting())):
        assert isinstance(as_weighting(weighting), GramWeighting)
