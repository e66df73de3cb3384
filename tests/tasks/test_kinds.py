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
    task = model.tasks[name]
    use_frequencies({name: task}, {name: kind_samples(kind=name)})  # type: ignore[dict-item]
    return model, task


@EVERY
def test_four_images_are_overfitted_and_found_again(name: str) -> None:
    model, task = build(name)
    made = kind_samples(kind=name)
    batch = task.collate(made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25 if name == "mask2former" else 60):
        loss = model(name, **batch).loss
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
    assert task.count_labels(bare["labels"]) == (4 if name == "mask2former" else 0)  # images without objects
    for batch in (
        bare,
        task.collate(kind_samples(kind=name)),
        task.collate([kind_samples(kind=name)[0], unlabelled[1]]),
    ):
        model.zero_grad()
        loss = model(name, **batch).loss
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
    assert not model(name, **batch).loss.isfinite()


@EVERY
def test_the_loss_of_a_batch_is_that_of_its_images_weighted_by_their_labels(name: str, monkeypatch) -> None:
    random = torch.rand

    def same_for_all(*size: int, **options: object) -> torch.Tensor:  # mask2former looks at random points
        return random(size[1:], generator=torch.Generator().manual_seed(0)).expand(size).clone()

    monkeypatch.setattr(torch, "rand", same_for_all)
    if name == "supcon":
        pytest.skip("a loss on pairs of a micro-batch")
    model, task = build(name)
    model.eval()  # without the noise on regions
    made = [*kind_samples(3, kind=name), kind_samples(4, boxes=False, kind=name)[3]]
    made[2] = {**made[2], "visible": torch.zeros(1, 3, dtype=torch.uint8)}
    parts = [task.collate([sample]) for sample in made]
    counts = [task.count_labels(part["labels"]) for part in parts]
    assert len(set(counts)) > 1 or name in ("arcface", "mask2former")
    with torch.no_grad():
        whole = task.collate(made)
        assert task.count_labels(whole["labels"]) == sum(counts)
        sums = [model(name, **part).loss * max(n, 1) for part, n in zip(parts, counts, strict=True)]
        found = model(name, **whole).loss
    torch.testing.assert_close(found, torch.stack(sums).sum() / max(sum(counts), 1), rtol=1e-4, atol=1e-5)


@EVERY
def test_graphs_have_the_outputs_of_the_model(name: str, tmp_path: Path) -> None:
    model, task = build(name)
    model.eval()
    pixels = torch.randn(2, 3, *SIZE)
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    if name not in ("numbers", "heatmap", "fcos_masks"):  # the others have no operation that others here lack
        graph = TaskGraph(model, name)
        graph(pixels)
        assert graph.names == (["class_logits", "mask_logits"] if name == "mask2former" else OUTPUTS[task.kind])
        return
    session = runtime.InferenceSession(write_onnx(model, name, tmp_path / "it.onnx"))
    assert [output.name for output in session.get_outputs()] == OUTPUTS[task.kind]
    found = session.run(None, {"pixel_values": pixels.numpy()})
    exporting = torch.compiler.is_exporting
    try:
        torch.compiler.is_exporting = lambda: True
        with torch.no_grad():
            expected = TaskGraph(model, name)(pixels)
    finally:
        torch.compiler.is_exporting = exporting
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-3, atol=1e-3)


@EVERY
def test_planned_activations_are_near_those_of_a_real_forward(name: str) -> None:
    model, task = build(name)
    example = task.example_labels(4)
    with SavedBytes(model) as real:
        model(name, torch.zeros(4, 3, *SIZE), example)
    with torch.device("meta"):
        empty = kind_model(name)
    notes: list[str] = []
    assert activation_bytes(empty, {name: 4}, torch.float32, False, notes)[name] == pytest.approx(real.bytes, rel=0.15)
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


@pytest.mark.parametrize("check", ["check_metrics", "check_zero3", "check_strong_heads"])
def test_two_ranks(ranks, check):
    assert ranks[check] == ""
