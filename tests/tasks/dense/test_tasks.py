"""What must hold for every kind with numbers per pixel, and for each of its heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from allinone_ds.data.augmentation.transforms import eval_transform, stack_images
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.views import predict_batch
from allinone_ds.export.onnx import TaskGraph, write_onnx
from allinone_ds.planning.activations import SavedBytes, activation_bytes
from allinone_ds.reporting.preview import draw_sample
from allinone_ds.tasks import TASKS
from allinone_ds.tasks.frequencies import use_frequencies
from allinone_ds.tasks.test_time import TestTime
from tests.tasks.dense.tiny import HEADS, KINDS, build, dense_model, dense_samples
from tests.tiny import SIZE

# head -> steps, largest allowed fraction of the first loss after them
OVERFIT = {
    "depth": (70, 0.1),
    "depth-l1": (60, 0.25),
    "depth-dpt": (40, 0.2),
    "normals": (40, 0.2),
    "edges": (70, 0.35),
    "saliency": (70, 0.4),
}


@pytest.mark.parametrize("head", OVERFIT)
def test_four_images_are_overfitted_and_the_metric_says_so(head: str) -> None:
    model, task = build(head)
    made = dense_samples()
    batch = task.collate(made)
    steps, fraction = OVERFIT[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model("map", **batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < fraction * losses[0], f"{losses[0]:.4f} -> {losses[-1]:.4f}"
    model.eval()
    metric = task.metric()
    with torch.no_grad():
        metric.update(task.predict(model("map", batch["pixel_values"]), [SIZE] * 4), made)
    found = metric.compute()
    assert set(found) >= set(task.greater_is_better)
    assert found[task.main_metric] > 0.75, found


@pytest.mark.parametrize("head", HEADS)
def test_without_a_value_the_loss_is_zero_and_every_weight_gets_a_finite_gradient(head: str) -> None:
    model, task = build(head)
    model.bfloat16()
    made = dense_samples(values=False)
    batch = task.collate(made)
    other = task.collate([task.unlabelled({"image": s["image"], "path": "", "index": 0}) for s in dense_samples()])
    torch.testing.assert_close(batch["labels"], other["labels"], equal_nan=True)
    assert task.count_labels(batch["labels"]) == 0
    loss = model("map", **batch).loss
    assert loss.dtype == torch.float32 and loss.item() == 0.0
    loss.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts_weighted_by_their_counts(head: str) -> None:
    model, task = build(head)
    model.double()
    made = dense_samples(3)
    made[1] = {**made[1], **{k: dense_samples(2, values=False)[1][k] for k in KINDS}}
    made[2][task.kind][..., 20:, :] = made[1][task.kind][..., 20:, :]  # fewer valid pixels

    def loss_and_count(part: list[dict]) -> tuple[Tensor, int]:
        labels = task.collate(part)["labels"]
        pixels = torch.stack([s["image"].as_subclass(Tensor) for s in part]).double() / 255
        return model("map", pixels, labels).loss, task.count_labels(labels)

    whole, count = loss_and_count(made)
    parts = [loss_and_count([sample]) for sample in made]
    assert count == sum(number for _, number in parts) and [number for _, number in parts][1] == 0
    torch.testing.assert_close(whole, sum(loss * number for loss, number in parts) / count, rtol=1e-5, atol=0)
    rest = dense_samples(1)[0][task.kind]
    assert parts[0][1] == (rest.shape[-2] - 2) * rest.shape[-1]


@pytest.mark.parametrize("head", ["depth", "normals", "edges", "saliency"])
def test_values_where_there_is_none_change_nothing(head: str) -> None:
    model, task = build(head)
    batch = task.collate(dense_samples())
    model("map", **batch).loss.backward()
    before = [p.grad.clone() for p in task.parameters()]
    model.zero_grad()
    model("map", **{**batch, "labels": batch["labels"].clone()}).loss.backward()  # the same again: deterministic
    assert all(torch.equal(old, p.grad) for old, p in zip(before, task.parameters(), strict=True))
    assert not any(grad.isnan().any() for grad in before)


@pytest.mark.parametrize("head", ["depth", "depth-dpt", "normals", "edges", "saliency"])
def test_a_diverged_backbone_gives_a_non_finite_loss_instead_of_a_crash(head: str) -> None:
    model, task = build(head)
    batch = task.collate(dense_samples())
    batch["pixel_values"] = batch["pixel_values"] * float("nan")
    assert not model("map", **batch).loss.isfinite()


@pytest.mark.parametrize("head", HEADS)
def test_predictions_have_the_size_of_the_images_and_are_drawn(head: str) -> None:
    model, task = build(head)
    model.eval()
    sizes = [SIZE, (64, 20), (10, 90)]
    with torch.no_grad():
        predictions = task.predict(model("map", **task.collate(dense_samples(3))), sizes)
    for prediction, (H, W) in zip(predictions, sizes, strict=True):
        assert prediction[task.kind].shape[-2:] == (H, W) and prediction[task.kind].isfinite().all()
        drawn = task.draw(torch.zeros(3, H, W, dtype=torch.uint8), prediction)
        assert drawn.dtype == torch.uint8 and drawn.shape[0] == 3 and min(drawn.shape[1:]) >= 320
        assert all(isinstance(value, float | list | None) for value in task.to_json(prediction).values())
    beside = task.draw(dense_samples(1)[0]["image"], predictions[0], dense_samples(1)[0])
    assert beside.shape[-1] > task.draw(dense_samples(1)[0]["image"], predictions[0]).shape[-1]
    truth = draw_sample(dense_samples(1)[0], [], TASKS[task.kind])
    assert truth.shape[-1] == 320
    score = task.sample_score(predictions[0], dense_samples(1)[0])
    assert score is not None and 0 <= score <= 1
    assert task.sample_score(predictions[0], dense_samples(1, values=False)[0]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_without_any_value_does_not_claim_success(kind: str) -> None:
    _, task = build(kind)
    metric = task.metric()
    values = {k: torch.rand(3, *SIZE) if k == "normals" else torch.rand(SIZE) for k in KINDS}
    metric.update([values], dense_samples(1, values=False))
    found = metric.compute()
    assert found[task.main_metric] == 0
    assert all(math.isnan(v) for k, v in found.items() if not task.greater_is_better[k])


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_views_are_merged_as_they_are_in_the_image(kind: str) -> None:
    model, task = build(kind)
    torch.nn.init.normal_(task.decoder.output.weight)  # answers that depend on the pixels
    model.eval()
    made = dense_samples(2)
    mirrored = [{**s, "image": s["image"].flip(-1)} for s in made]

    def predicted(samples: list[dict], flip: bool) -> list[Tensor]:
        pixels = stack_images([eval_transform(SIZE)({"image": s["image"]}) for s in samples])
        test_time = TestTime(flip=True) if flip else None  # type: ignore[call-arg]
        return [p[task.kind] for p in predict_batch(model, task, pixels, samples, test_time)]

    for one, other in zip(predicted(made, True), predicted(mirrored, True), strict=True):
        back = task.unflipped(other if kind == "normals" else other[None]).reshape(one.shape)
        torch.testing.assert_close(one, back, rtol=1e-4, atol=1e-4)
    plain = predicted(made, False)[0]
    assert (plain - predicted(made, True)[0]).abs().max() > 1e-3


def test_the_x_of_a_mirrored_normal_changes_its_sign() -> None:
    _, task = build("normals")
    right = torch.tensor([0.6, 0.0, 0.8]).view(3, 1, 1).expand(3, 2, 4).clone()
    right[:, :, :1] = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)
    mirrored = right.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    assert torch.equal(task.unflipped(mirrored), right)


def test_depth_refuses_scales_and_the_others_take_all_views() -> None:
    every = TestTime(scales=[1.0, 1.5], flip=True, windows=True)
    for kind in KINDS:
        _, task = build(kind)
        task.check_test_time(TestTime(flip=True))  # type: ignore[call-arg]
        if kind == "depth":
            with pytest.raises(ConfigError, match="only 'flip'"):
                task.check_test_time(every)
        else:
            model, task = build(kind)
            pixels = torch.rand(1, 3, *SIZE)
            found = predict_batch(model.eval(), task, pixels, dense_samples(1), every)[0][kind]
            assert found.shape[-2:] == SIZE and found.isfinite().all()


def test_priors_are_what_a_constant_prediction_does_best() -> None:
    heads = {name: HEADS[name] for name in ("depth", "edges", "edges-plain", "saliency")}
    model = dense_model(heads)

    class Made:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict:
            return dense_samples()[index]

    notes = use_frequencies(dict(model.tasks), dict.fromkeys(heads, Made()))
    assert len(notes) == 3 and "median depth is 4.00" in notes[0]  # the balanced loss starts at 0.5
    made = dense_samples()
    for name, task in model.tasks.items():
        bias = task.decoder.output.bias.detach()
        assert task.samples_to_count() == (0 if bias.any() or name == "edges" else 64)
        labels = task.collate(made)["labels"]

        def loss(value: float, task=task, labels=labels) -> float:
            return float(task.loss(torch.full((4, 1, *SIZE), value), labels))

        if name == "depth":
            assert math.exp(float(bias)) == pytest.approx(4.0)
        else:
            best = loss(float(bias))
            assert best < loss(float(bias) + 0.1) and best < loss(float(bias) - 0.1), name


@pytest.mark.parametrize("kind", KINDS)
def test_exported_outputs_are_those_of_predict(kind: str) -> None:
    model, task = build(kind)
    pixels = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        outputs = model.eval()("map", pixels)
        found = task.export_outputs(outputs)
        size = found[kind].shape[-2:]
        predicted = [prediction[kind] for prediction in task.predict(outputs, [tuple(size)] * 2)]
    assert list(found) == [kind]
    torch.testing.assert_close(found[kind], torch.stack(predicted))


@pytest.mark.parametrize("head", ["depth-dpt", "normals"])  # decoders of both kinds, with one and three numbers
def test_onnx_graphs_equal_the_model(head: str, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    model = dense_model({"map": HEADS[head]}, num_hidden_layers=1).eval()
    torch.nn.init.normal_(model.tasks["map"].decoder.output.weight)
    graph = TaskGraph(model, "map")
    session = runtime.InferenceSession(write_onnx(model, "map", tmp_path / "map.onnx"))
    assert [value.name for value in session.get_outputs()] == [HEADS[head][0]]
    for count in (1, 3):
        pixels = torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))
        actual = session.run(None, {"pixel_values": pixels.numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(actual, graph(pixels)[0].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["depth", "depth-dpt", "normals", "edges", "saliency"])
def test_planned_activations_are_those_of_a_real_forward(head: str) -> None:
    model, task = build(head)
    with SavedBytes(model) as real:
        model("map", **task.collate(dense_samples()))
    with torch.device("meta"):
        empty = dense_model({"map": HEADS[head]})
    notes: list[str] = []
    assert activation_bytes(empty, {"map": 4}, torch.float32, False, notes)["map"] == pytest.approx(real.bytes, 0.15)
    assert notes == []
