"""What must hold for every task and head: it learns, in any dtype, with or without targets."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from allinone_ds.tasks import build_task
from allinone_ds.tasks.classification import ClassificationTask
from tests.tasks.heads import HEADS, build
from tests.tiny import SIZE, TYPES, samples, tiny_model

# head -> steps, learning rate, largest allowed fraction of the first loss after them
OVERFIT = {
    "fcos": (60, 3e-3, 0.3),
    "fcos-pyramid": (40, 3e-3, 0.4),
    "rf_detr": (80, 2e-3, 0.5),
    "light": (60, 3e-3, 0.25),
    "upernet": (40, 3e-3, 0.4),
    "mask2former": (60, 2e-3, 0.5),
    "linear": (25, 3e-3, 0.1),
    "arcface": (40, 3e-3, 0.1),
    "sub-center": (40, 3e-3, 0.1),
}


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Context that records the names of the collectives called inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", HEADS)
def test_no_forward_or_loss_communicates(one_rank, head):
    # ranks that run a different task at that time would not take part
    model, name, task = build(head)
    with Collectives() as collectives:
        dist.all_reduce(torch.zeros(1))
        model(name, **task.collate(samples())).loss.backward()
    assert collectives.names == ["c10d.allreduce_.default"]  # that of this test


@pytest.mark.parametrize("head", HEADS)
def test_four_images_are_overfitted(head):
    model, name, task = build(head)
    batch = task.collate(samples())
    steps, rate, fraction = OVERFIT[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(name, **batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < fraction * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_that_one_class_makes_constant_is_said(head):
    """A softmax over one class has no gradient; every other loss has one."""
    model, name, task = build(head)
    assert task.constant_loss() is None
    _, kind, options = HEADS[head]
    options = {key: value for key, value in options.items() if key != "class_counts"}
    features, pixels = (torch.randn(4, 32, 8, 8),) * task.num_levels, torch.zeros(4, 3, *SIZE)
    one = build_task(TYPES[name], name, ["thing"], model.backbone, SIZE, kind, options)
    made = [{**s, "label": 0, "labels": 0 * s["labels"], "mask": s["mask"].clamp(max=0)} for s in samples()]
    loss = one(features, pixels, one.collate(made)["labels"]).loss
    loss.backward()
    constant = loss == 0 and not any(p.grad.any() for p in one.parameters() if p.grad is not None)
    assert bool(constant) == (one.constant_loss() is not None) == (head in CONSTANT)
    if constant:
        assert "its data has one class, 'thing'" in one.constant_loss() and "; " in one.constant_loss()


CONSTANT = ("light", "upernet", "linear", "arcface", "sub-center")


class OwnLoss(ClassificationTask):
    def forward(self, features, pixel_values, labels=None):
        raise NotImplementedError


def test_a_class_with_a_loss_of_its_own_may_have_one_class():
    assert OwnLoss("cls", ["thing"], channels=8, stride=4, num_levels=1, image_size=(16, 16)).constant_loss() is None


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_weights_give_a_finite_float32_loss(head):
    model, name, task = build(head)
    model.bfloat16()
    loss = model(name, **task.collate(samples())).loss
    assert loss.dtype == torch.float32 and loss.isfinite() and loss.ndim == 0
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("head", HEADS)
def test_autocast_gives_the_same_loss_in_float32(head):
    model, name, task = build(head)
    model.eval()
    batch = task.collate(samples())
    plain = model(name, **batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(name, **batch).loss
    assert cast.dtype == torch.float32
    torch.testing.assert_close(plain, cast, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("head", HEADS)
def test_every_weight_of_the_head_gets_a_gradient_even_without_targets(head):
    model, name, task = build(head)
    batch = task.collate(samples(boxes=False))
    if name == "seg":
        batch["labels"][:] = 255
    loss = model(name, **batch).loss
    assert loss.isfinite()
    loss.backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    if name == "seg":
        assert loss.item() == 0.0


@pytest.mark.parametrize("head", ["fcos", "rf_detr", "light", "mask2former"])
def test_a_diverged_backbone_gives_a_non_finite_loss_instead_of_a_crash(head):
    model, name, task = build(head)
    batch = task.collate(samples())
    batch["pixel_values"] = batch["pixel_values"] * float("nan")
    assert not model(name, **batch).loss.isfinite()


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_with_labels_has_a_loss_and_predictions_for_each_image(head):
    model, name, task = build(head)
    model.eval()
    with torch.no_grad():
        out = model(name, **task.collate(samples(3)))
    assert out.loss.isfinite()
    predictions = task.predict(out, [SIZE, (64, 20), (10, 90)])
    metric = task.metric()
    metric.update(predictions[:1], samples(1))
    assert set(metric.compute()) >= {task.main_metric}
    for prediction, (H, W) in zip(predictions, [SIZE, (64, 20), (10, 90)], strict=True):
        drawn = task.draw(torch.zeros(3, H, W, dtype=torch.uint8), prediction)
        assert drawn.dtype == torch.uint8 and drawn.shape[0] == 3 and min(drawn.shape[1:]) >= 320
        assert isinstance(task.to_json(prediction), dict)


@pytest.mark.parametrize(("name", "main"), [("det", "map50"), ("seg", "miou"), ("cls", "top1")])
def test_main_metric_is_computed(name, main):
    task = tiny_model().tasks[name]
    assert task.main_metric == main and main in task.metric().compute()
