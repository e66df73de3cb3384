"""Balancing at the features: equal to torchjd, to one process on DDP and FSDP2, and clear about misuse."""

from pathlib import Path

import pytest
import torch
import torchjd.aggregation
from torch import Tensor, nn
from torchjd.autojac import jac_to_grad, mtl_backward

from allinone_ds import DBMTL, TBGC, FeatureBalance, GlobalClip, GramWeighting, Sum, TaskClip, task_features
from allinone_ds.errors import BalancerError, ConfigError
from benchmarks.common.memory import peak_tensor_bytes
from tests.launcher import run_ranks

METHODS = {
    "UPGrad": "UPGradWeighting", "MGDA": "MGDAWeighting", "AlignedMTL": "AlignedMTLWeighting",
    "IMTLG": "IMTLGWeighting", "DualProj": "DualProjWeighting",
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, tasks: int):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({f"task{i}": nn.Linear(6, i % 3 + 1) for i in range(tasks)})

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.heads)

    def loss(self, task: str, features: Tensor) -> Tensor:
        return (self.heads[task](features) - 0.5).square().mean() * (1 + 2 * int(task[-1]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {task: self.loss(task, task_features(features, task)) for task in self.heads}


def _model(tasks: int = 3) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(tasks).double(), torch.randn(4, 5, dtype=torch.float64)


def _gradients(model: Model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def _memory_of(tasks: int) -> int:
    """Return the peak of tensor bytes in a step, in units of the features."""
    names = [f"task{i}" for i in range(tasks)]
    scales = [torch.ones((), requires_grad=True) for _ in names]
    weight, balance = torch.ones(100_000, requires_grad=True), FeatureBalance(names, TBGC(max_norm=0.1))

    def step() -> None:
        with balance.joint():
            features = weight * 2.0
            balance.backward(
                {t: (task_features(features, t) * scale).sum() for t, scale in zip(names, scales, strict=True)}
            )

    return peak_tensor_bytes(step) // weight.nbytes


def test_memory_does_not_grow_with_the_number_of_tasks():
    """On one process: no gradients are kept for tasks that have been measured, nor during the backbone's backward."""
    assert _memory_of(40) <= _memory_of(8) + 1
    assert _memory_of(40) < 14


@pytest.mark.parametrize("tasks", [3, 11])
@pytest.mark.parametrize("weighting", [TBGC(max_norm=0.1), Sum()])
def test_gradients_in_parts_equal_those_of_one_process_per_task(weighting, tasks):
    model, x = _model(tasks)
    balance = FeatureBalance(model.tasks, weighting)
    with balance.joint():
        balance.backward(model(x))
    norms, found = balance.report().norms, _gradients(model)
    model.zero_grad()
    features = model.backbone(x)
    read = features.detach().requires_grad_()
    rows = {t: torch.autograd.grad(model.loss(t, read), read)[0] for t in model.tasks}
    factors = {
        t: 1.0 if isinstance(weighting, Sum) else min(1.0, 0.1 / (float(g.norm()) + 1e-6)) for t, g in rows.items()
    }
    features.backward(sum(factors[t] * g for t, g in rows.items()))
    for name, p in model.backbone.named_parameters(prefix="backbone"):
        torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-9)
    for task, row in rows.items():
        assert abs(float(norms[task]) / float(row.norm()) - 1) < 1e-5


@pytest.mark.parametrize("tasks", [3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_equals_mtl_backward_of_torchjd(method, tasks):
    model, x = _model(tasks)
    weighting = getattr(torchjd.aggregation, METHODS[method])()
    balance = FeatureBalance(model.tasks, weighting)
    with balance.joint():
        balance.backward(model(x))
    found = _gradients(model)
    model.zero_grad()
    features = model.backbone(x)
    read = features.detach().requires_grad_()  # mtl_backward aggregates at parameters: here the features are one
    joined = read * 1.0
    mtl_backward([model.loss(task, joined) for task in model.heads], joined, shared_params=[read])
    jac_to_grad([read], getattr(torchjd.aggregation, method)())
    features.backward(read.grad)
    for name, p in model.named_parameters():
        assert float((found[name] - p.grad).norm() / p.grad.norm()) < 1e-5, name


def test_the_sum_is_a_plain_backward_and_micro_steps_are_means():
    model, x = _model()
    sum(model(x).values()).backward()
    wanted = _gradients(model)
    model.zero_grad()
    balance = FeatureBalance(model.tasks, Sum())
    with balance.joint(micro_steps=2):
        for part in x.split(2):
            balance.backward(model(part))
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name])
    assert {task: float(scale) for task, scale in balance.report().scales.items()} == dict.fromkeys(model.tasks, 1.0)


def test_counts_weigh_micro_batches_only_within_a_micro_step():
    """On one rank the mean over the labels of a micro-step is the loss itself."""
    model, x = _model()
    balance = FeatureBalance(model.tasks, TBGC(max_norm=0.01))
    norms = []
    for count in (None, dict.fromkeys(model.tasks, 7)):
        with balance.joint():
            balance.backward(model(x), count)
        norms.append({task: float(norm) for task, norm in balance.report().norms.items()})
    assert norms[0] == norms[1]


def test_a_task_without_labels_has_no_part():
    model, x = _model()
    for missing, rest in (({"task0": None}, ("task1", "task2")), (dict.fromkeys(model.tasks), ())):
        for weighting in (TBGC(max_norm=0.01), DBMTL()):
            model.zero_grad()
            balance = FeatureBalance(model.tasks, weighting)
            with balance.joint():
                balance.backward({**model(x), **missing})
            report = balance.report()
            assert report.tasks == tuple(report.norms) == rest and not report.skipped
            gradients = [p.grad for p in model.backbone.parameters()]
            assert all(bool(g.any()) == bool(rest) and bool(torch.isfinite(g).all()) for g in gradients)


def test_a_task_that_is_not_finite_is_named_and_does_not_reach_the_backbone():
    model, x = _model()
    for weighting in (TBGC(max_norm=0.01), GramWeighting(lambda gram: torch.ones(len(gram)))):
        model.zero_grad()
        balance = FeatureBalance(model.tasks, weighting)
        with balance.joint():
            balance.backward({task: loss * (float("nan") if task == "task1" else 1) for task, loss in model(x).items()})
        report = balance.report()
        assert report.skipped == ("task1",) and not report.applied
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.backbone.parameters())


def test_marks_do_nothing_elsewhere():
    model, x = _model()
    features = model.backbone(x)
    assert task_features(features, "anything") is features
    balance = FeatureBalance(model.tasks, TBGC())
    with balance.joint():
        with torch.no_grad():
            assert task_features(features, "task0") is features, "evaluation inside the block"
        balance.backward(model(x))


def test_state_continues():
    model, x = _model()
    scales = []
    for reload in (False, True):
        balance = FeatureBalance(model.tasks, DBMTL(beta=0.9))
        for step in range(2):
            with balance.joint():
                balance.backward(model(x * (1 + step)))
            if reload and step == 0:
                state, balance = balance.state_dict(), FeatureBalance(model.tasks, DBMTL(beta=0.9))
                balance.load_state_dict(state)
        scales.append({task: float(scale) for task, scale in balance.report().scales.items()})
    assert scales[0] == scales[1]


def test_misuse_is_an_error():
    model, x = _model()
    balance = FeatureBalance(model.tasks, TBGC())
    with pytest.raises(BalancerError, match="outside its block"):
        balance.backward(model(x))
    with pytest.raises(BalancerError, match="before a block has ended"):
        balance.report()
    with pytest.raises(BalancerError, match="after 0 of 1 micro-steps"), balance.joint():
        pass
    with pytest.raises(BalancerError, match="more than its 1 micro-steps"), balance.joint():
        balance.backward(model(x))
        balance.backward(model(x))
    with pytest.raises(BalancerError, match="inside another one"), balance.joint(), balance.joint():
        pass
    with pytest.raises(BalancerError, match="unknown task 'taskX'"), balance.joint():
        balance.backward({**model(x), "taskX": None})
    with pytest.raises(BalancerError, match="no loss of task 'task2'"), balance.joint():
        balance.backward({task: loss for task, loss in model(x).items() if task != "task2"})
    with pytest.raises(BalancerError, match=r"of task 'task1' is a tensor of shape \(3,\)"), balance.joint():
        balance.backward({**model(x), "task1": torch.ones(3)})
    with pytest.raises(BalancerError, match="unknown task 'other'"), balance.joint():
        task_features(model.backbone(x), "other")
    with pytest.raises(BalancerError, match="a second time"), balance.joint():
        task_features(task_features(model.backbone(x), "task0"), "task0")
    with pytest.raises(BalancerError, match="are dict"), balance.joint():
        task_features((dict(model(x)),), "task0")
    with pytest.raises(BalancerError, match="no features are marked for task 'task0'"), balance.joint():
        features = model.backbone(x)
        balance.backward({task: model.loss(task, features) for task in model.tasks})
    with pytest.raises(BalancerError, match="loss of task 'task1' does not reach"), balance.joint():
        losses, features = model(x), model.backbone(x)
        balance.backward({**losses, "task1": model.loss("task1", features)})
    with balance.joint():
        balance.backward(model(x))
    assert not balance.report().skipped, "usable after every error"


def test_features_that_differ_need_a_weighting_that_streams():
    def losses(model: Model, x: Tensor) -> dict[str, Tensor]:
        return {task: model.loss(task, task_features(model.backbone(x), task)) for task in model.tasks}

    model, x = _model()
    balance = FeatureBalance(model.tasks, TBGC(max_norm=0.01))
    with balance.joint():
        balance.backward(losses(model, x))
    assert set(balance.report().norms) == set(model.tasks)
    with pytest.raises(BalancerError, match="marks other features"), FeatureBalance(model.tasks, DBMTL()).joint():
        losses(model, x)


@pytest.mark.parametrize("weighting", [GlobalClip(), TaskClip()])
def test_weightings_that_need_whole_norms_are_refused(weighting):
    with pytest.raises(ConfigError, match="not known at the features"):
        FeatureBalance(("a",), weighting)


def test_ranks(tmp_path):
    """DDP and FSDP2, with labels that only some ranks have."""
    for name, problem in run_ranks(Path(__file__).with_name("ranks_features.py"), 2, tmp_path).items():
        assert not problem, f"{name}: {problem}"


def test_the_loop_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "joint.md").read_text()
    code = page.split("## Without DeepSpeed")[1].split("```python")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert set(names["report"].norms) == {"seg", "depth"} and names["report"].applied
