"""What must hold for every kind with objects or vectors: it learns, counts, is drawn, exported and planned."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.views import predict_batch
from allinone_ds.export.onnx import TaskGraph, write_onnx
from allinone_ds.planning.activations import SavedBytes, activation_bytes
from allinone_ds.tasks.frequencies import use_frequencies
from allinone_ds.tasks.test_time import TestTime
from tests.launcher import run_ranks
from tests.tasks.kinds import KINDS, kind_model, kind_samples
from tests.tiny import SIZE

EVERY = pytest.mark.parametrize("name", KINDS)
OUTPUTS = {
    "attributes": ["logits"],
    "regression": ["value"],
    "retrieval": ["embedding"],
    "keypoints": ["boxes", "scores", "labels", "keypoints", "point_scores"],
    "instances": ["boxes", "scores", "labels", "masks"],
}


def build(name: str) -> tuple[Any, Any]:
    model = kind_model(name)
    task = model.tasks["it"]
    use_frequencies({"it": task}, {"it": kind_samples(kind=name)})  # type: ignore[dict-item]
    return model, task


@EVERY
def test_four_images_are_overfitted_and_found_again(name: str) -> None:
    model, task = build(name)
    made = kind_samples(kind=name)
    batch = task.collate(made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25 if name == "mask2former" else 60):
        loss = model("it", **batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"
    model.eval()
    predictions = predict_batch(model, task, batch["pixel_values"], made)
    metric = task.metric()
    metric.update(predictions, made)
    metrics = metric.compute()
    assert set(metrics) <= set(task.greater_is_better)
    if task.kind != "retrieval":  # two of four images have no other of their identity
        assert metrics[task.main_metric] > 0.6, metrics
    details = task.details(metric)
    assert all(len(column) == len(task.classes) for column in details.get("per_class", {}).values())
    views = TestTime(scales=[1.0, 1.25], flip=True)
    merged = predict_batch(model, task, batch["pixel_values"], made, views)
    assert [sorted(p) for p in merged] == [sorted(p) for p in predictions]
    metric.reset()
    metric.update(merged, made)
    assert set(metric.compute()) == set(metrics)
    with pytest.raises(ConfigError, match="windows"):
        task.check_test_time(TestTime(windows=True))
    for prediction, sample in zip(predictions, made, strict=True):
        json.dumps(task.to_json(prediction))
        for truth in (None, sample):
            drawn = task.draw(sample["image"], prediction, truth)
            assert drawn.dtype == torch.uint8 and drawn.shape[0] == 3
        score = task.sample_score(prediction, sample)
        assert score is None or 0 <= score <= 1
    drawn, text = type(task).draw_truth(made[0], task.classes)
    assert drawn.shape[0] == 3 and isinstance(text, str)


@EVERY
def test_bfloat16_weights_and_images_without_targets_give_a_finite_loss_and_every_gradient(name: str) -> None:
    model, task = build(name)
    model.bfloat16()
    unlabelled = [type(task).unlabelled({k: s[k] for k in ("image", "path", "index")}) for s in kind_samples()]
    bare = task.collate(unlabelled)
    assert task.count_labels(bare["labels"]) == 0
    for batch in (
        bare,
        task.collate(kind_samples(kind=name)),
        task.collate([kind_samples(kind=name)[0], unlabelled[1]]),
    ):
        model.zero_grad()
        loss = model("it", **batch).loss
        assert loss.dtype == torch.float32 and loss.isfinite() and loss.ndim == 0
        loss.backward()
        without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@EVERY
def test_a_diverged_backbone_gives_a_non_finite_loss_instead_of_a_crash(name: str) -> None:
    model, task = build(name)
    batch = task.collate(kind_samples(kind=name))
    batch["pixel_values"] = batch["pixel_values"] * float("nan")
    assert not model("it", **batch).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "count"),
    [("binary", 11), ("numbers", 7), ("arcface", 4), ("heatmap", 4), ("fcos_masks", 4), ("mask2former", 4)],
)
def test_a_loss_is_a_mean_over_what_is_counted(name: str, count: int) -> None:
    model, task = build(name)
    made = kind_samples(kind=name)
    assert task.count_labels(task.collate(made)["labels"]) == count
    if name in ("binary", "numbers", "arcface"):  # the others add losses with different means
        model.eval()
        parts = [task.collate(made[:1]), task.collate(made[1:])]
        weighted = [task.count_labels(part["labels"]) * model("it", **part).loss for part in parts]
        torch.testing.assert_close(model("it", **task.collate(made)).loss, sum(weighted) / count)


@EVERY
def test_graphs_have_the_outputs_of_the_model(name: str, tmp_path: Path) -> None:
    model, task = build(name)
    model.eval()
    pixels = torch.randn(2, 3, *SIZE)
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    if name not in ("numbers", "heatmap", "fcos_masks"):  # the others have no operation that others here lack
        graph = TaskGraph(model, "it")
        graph(pixels)
        assert graph.names == (["class_logits", "mask_logits"] if name == "mask2former" else OUTPUTS[task.kind])
        return
    session = runtime.InferenceSession(write_onnx(model, "it", tmp_path / "it.onnx"))
    assert [output.name for output in session.get_outputs()] == OUTPUTS[task.kind]
    found = session.run(None, {"pixel_values": pixels.numpy()})
    exporting = torch.compiler.is_exporting
    try:
        torch.compiler.is_exporting = lambda: True
        with torch.no_grad():
            expected = TaskGraph(model, "it")(pixels)
    finally:
        torch.compiler.is_exporting = exporting
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-3, atol=1e-3)


@EVERY
def test_planned_activations_are_near_those_of_a_real_forward(name: str) -> None:
    model, task = build(name)
    example = task.example_labels(4)
    with SavedBytes(model) as real:
        model("it", torch.zeros(4, 3, *SIZE), example)
    with torch.device("meta"):
        empty = kind_model(name)
    notes: list[str] = []
    assert activation_bytes(empty, {"it": 4}, torch.float32, False, notes)["it"] == pytest.approx(real.bytes, rel=0.15)
    assert bool(notes) == (example is None)


@EVERY
def test_a_threshold_selects_scores_or_is_refused(name: str) -> None:
    model, task = build(name)
    model.eval()
    made = kind_samples(1)
    prediction = predict_batch(model, task, task.collate(made)["pixel_values"], made)[0]
    if task.shown_score is None:
        with pytest.raises(ConfigError, match="no score to compare"):
            task.at_least(prediction, 0.5)
        return
    kept = task.at_least(copy.deepcopy(prediction), 0.9)
    assert set(kept) == set(prediction)
    if task.kind == "attributes":
        assert torch.equal(kept["present"], prediction["scores"] >= 0.9)
    else:
        assert (kept["scores"] >= 0.9).all() and len({len(value) for value in kept.values()}) == 1


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(Path(__file__).parent / "ranks_kinds.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", ["check_metrics", "check_zero3"])
def test_two_ranks(ranks, check):
    assert ranks[check] == ""
