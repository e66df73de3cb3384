"""The loss of classes against torch and torchvision, and the prior that keeps a head from collapsing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from allinone_ds.errors import ConfigError
from allinone_ds.models.class_loss import ClassLoss, ClassLossOptions, set_prior, smoothed
from allinone_ds.models.segmenters import segmentation_loss
from allinone_ds.tasks import build_task
from allinone_ds.tasks.frequencies import use_frequencies
from tests.tasks.heads import build
from tests.tiny import CLASSES, SIZE, samples, tiny_backbone


def loss_of(**options: Any) -> ClassLoss:
    return ClassLoss(3, ClassLossOptions(**options))


def targets() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 5, 4))
    labels[0, 0] = 255
    return torch.randn(2, 3, 5, 4) * 3, labels


def test_weights_and_smoothing_are_those_of_torch() -> None:
    logits, labels = targets()
    weights = [0.5, 2.0, 1.0]
    found = loss_of(class_weights=weights, label_smoothing=0.1)
    expected = F.cross_entropy(
        logits, labels, torch.tensor(weights), ignore_index=255, reduction="sum", label_smoothing=0.1
    )
    torch.testing.assert_close(found(logits, labels, True, 255), expected)
    plain = F.cross_entropy(logits, labels, torch.tensor(weights), ignore_index=255, reduction="sum")
    torch.testing.assert_close(found(logits, labels, False, 255), plain)  # evaluation smooths nothing
    mean = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, labels, 255), mean)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_loss_of_two_classes_is_that_of_torchvision(gamma: float) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(50) * 4, torch.randint(0, 2, (50,))
    x.requires_grad_()
    logits = torch.stack([-x / 2, x / 2], dim=1)  # their difference is x
    found = ClassLoss(2, ClassLossOptions(focal_gamma=gamma))(logits, labels, True)  # type: ignore[call-arg]
    expected = sigmoid_focal_loss(x, labels.float(), alpha=-1, gamma=gamma, reduction="sum")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, retain_graph=True)[0], torch.autograd.grad(expected, x)[0])


def test_focal_loss_has_a_finite_gradient_everywhere() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [-200.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 255])
    loss = loss_of(focal_gamma=0.5)(logits, labels, True, 255)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
    assert (logits.grad[2] == 0).all()  # ignored


def test_wrong_weights_are_refused() -> None:
    for weights, message in (([1.0, 2.0], "2 entries.*3 classes"), ([0.0, 0.0, 0.0], "at least one of them above 0")):
        with pytest.raises(ConfigError, match=message):
            loss_of(class_weights=weights)
    for options in ({"class_weights": [-1.0, 1, 1]}, {"class_weights": "balance"}, {"focal_gamma": -1}):
        with pytest.raises(ConfigError, match="tasks.seg.options"):
            build_task("segmentation", "seg", CLASSES, tiny_backbone(), SIZE, "light", options)


def test_balanced_weights_give_every_class_the_same_share_of_the_loss() -> None:
    loss = loss_of(class_weights="balanced")
    frequencies = [0.9, 0.09, 0.01]
    loss.use_frequencies(frequencies)
    assert loss.weights is not None
    shares = [f * w for f, w in zip(smoothed(frequencies), loss.weights, strict=True)]
    assert shares == pytest.approx([1 / 3] * 3)
    fixed = loss_of(class_weights=[1.0, 1.0, 3.0])
    fixed.use_frequencies(frequencies)
    assert fixed.weights == [1.0, 1.0, 3.0]


def test_a_prior_gives_the_frequencies_and_leaves_a_trained_bias_alone() -> None:
    bias = torch.zeros(3)
    assert set_prior(bias, [0.7, 0.3, 0.0])
    assert bias.softmax(0).tolist() == pytest.approx([0.7, 0.3, 0.001 / 3], abs=1e-3) and bias.isfinite().all()
    weighted = torch.zeros(3)
    assert set_prior(weighted, [0.7, 0.3, 0.0], [1.0, 4.0, 1.0])  # as if each target of the second class were four
    assert weighted.softmax(0).tolist() == pytest.approx([0.7 / 1.9, 1.2 / 1.9, 0.0], abs=2e-3)
    balanced, loss = torch.zeros(3), loss_of(class_weights="balanced")
    loss.use_frequencies([0.7, 0.3, 0.0])
    assert set_prior(balanced, [0.7, 0.3, 0.0], loss.weights)
    assert balanced.softmax(0).tolist() == pytest.approx([1 / 3] * 3)
    trained = bias.clone()
    assert not set_prior(bias, [0.1, 0.1, 0.8]) and torch.equal(bias, trained)


@pytest.mark.parametrize("head", ["light", "upernet"])
def test_frequencies_are_counted_from_the_data_and_predicted_at_the_start(head: str) -> None:
    model, name, task = build(head)
    data = samples(6)
    notes = use_frequencies({name: task}, {name: data})  # type: ignore[dict-item]
    masks = [sample["mask"].as_subclass(Tensor).long() for sample in data]
    shares = torch.stack([torch.bincount(m[m != 255], minlength=3) / (m != 255).sum() for m in masks]).mean(0)
    with torch.no_grad():
        outputs = model.eval()(name, **{"pixel_values": task.collate(data)["pixel_values"]})
    found = outputs.logits.softmax(1).mean((0, 2, 3))
    torch.testing.assert_close(found, shares, atol=0.02, rtol=0)
    assert notes[0].startswith(f"{name}: class frequencies of 6 training images: circle {float(shares[0]):.2%}")
    assert use_frequencies({name: task}, {name: data}) == []  # type: ignore[dict-item]  # the bias is set


def test_heads_without_an_option_read_no_data() -> None:
    class Unread(list):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("read")

    for head in ("fcos", "mask2former", "linear", "arcface"):
        _, name, task = build(head)
        assert use_frequencies({name: task}, {name: Unread(range(3))}) == []  # type: ignore[dict-item]
    uniform = build_task("segmentation", "seg", CLASSES, tiny_backbone(), SIZE, "light", {"prior": "uniform"})
    assert use_frequencies({"seg": uniform}, {"seg": Unread(range(3))}) == []  # type: ignore[dict-item]


def test_classification_counts_images() -> None:
    backbone = tiny_backbone()
    options = {"prior": "data", "class_weights": "balanced"}
    task = build_task("classification", "cls", CLASSES, backbone, SIZE, "linear", options)
    data = [sample | {"label": [0, 0, 0, 1][i % 4]} for i, sample in enumerate(samples(8))]
    (note,) = use_frequencies({"cls": task}, {"cls": data})  # type: ignore[dict-item]
    assert note == (
        "cls: class frequencies of 8 training images: circle 75.00%, square 25.00%, cross 0.00%; 1 of 3 classes in "
        "none of them"
    )
    plain = build_task("classification", "cls", CLASSES, backbone, SIZE, "linear", {"prior": "data"})
    use_frequencies({"cls": plain}, {"cls": data})  # type: ignore[dict-item]
    assert plain.classifier.bias.softmax(0)[:2].tolist() == pytest.approx([0.75, 0.25], abs=1e-3)
    assert task.classifier.criterion.weights[1] == pytest.approx(1 / (3 * 0.25), rel=2e-3)
    assert math.isfinite(task.classifier.criterion.weights[2])


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Small squares of eight colours, each a class, on a ninth class that has 95 % of the pixels."""
    colours = torch.tensor([[r, g, b] for r in (-1.5, 1.5) for g in (-1.5, 1.5) for b in (-1.5, 1.5)])
    images, masks = torch.randn(count, 3, *SIZE, generator=generator) * 0.3, torch.zeros(count, *SIZE).long()
    for image, mask in zip(images, masks, strict=True):
        k, y, x = (int(torch.randint(high, (1,), generator=generator)) for high in (8, 25, 25))
        image[:, y : y + 7, x : x + 7] += colours[k][:, None, None]
        mask[y : y + 7, x : x + 7] = k + 1
    return images, masks


def test_the_prior_keeps_the_gradient_of_the_backbone_alive() -> None:
    """Without it the head's gradient on the backbone falls by orders of magnitude while it learns the background."""
    norms = {}
    for prior in ("uniform", "data"):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        backbone = tiny_backbone(patch_size=8)
        names = [str(k) for k in range(9)]
        task = build_task("segmentation", "seg", names, backbone, SIZE, "light", {"width": 32, "prior": prior})
        data = [{"mask": mask} for mask in scenes(32, generator)[1]]
        assert bool(use_frequencies({"seg": task}, {"seg": data})) == (prior == "data")  # type: ignore[dict-item]
        parameters = [*backbone.parameters(), *task.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        measured = []
        for _ in range(40):
            images, masks = scenes(4, generator)
            task(backbone(images).feature_maps, images, masks).loss.backward()
            grads = [p.grad for p in backbone.parameters() if p.grad is not None]
            measured.append(float(torch.stack([g.norm() for g in grads]).norm()))
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        norms[prior] = sorted(measured[20:])[10]
    assert norms["data"] > 20 * norms["uniform"], norms
