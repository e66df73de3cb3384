"""A new task kind is one class and one line of `TASKS`: every part of the package that knows kinds asks the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.export.card import Origin, model_card
from allinone_ds.export.description import ExportedTask, ModelDescription
from allinone_ds.export.onnx import TaskGraph, write_onnx
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.planning.activations import SavedBytes, activation_bytes
from allinone_ds.reporting.preview import draw_sample, truth_drawer
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.tasks import TASKS, Task, build_task
from allinone_ds.tasks.classification import ClassificationTask
from allinone_ds.tasks.drawing import caption, enlarge
from tests.tiny import CLASSES, SIZE, TINY, samples, tiny_backbone


class BrightnessTask(Task):
    """Predicts one number per image. Labels: (B,) float32, key "brightness" of a sample, 0..1."""

    kind = "brightness"
    main_metric = "close"
    pipeline_tag = "brightness-estimation"

    def __init__(self, name: str, classes: Sequence[str], channels: int, *args: Any, **options: Any) -> None:
        super().__init__(name, classes, channels, *args, **options)
        self.head = nn.Linear(channels, 1)

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ImageClassifierOutput:
        logits = self.head(features[-1].mean((-2, -1))).float()[:, 0]  # (B,)
        return ImageClassifierOutput(loss=None if labels is None else (logits - labels).square().mean(), logits=logits)

    @staticmethod
    def collate(samples: Sequence[dict]) -> dict[str, Any]:
        return {"pixel_values": stack_pixels(samples), "labels": torch.tensor([s["brightness"] for s in samples])}

    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        return [{"brightness": value} for value in outputs.logits.tolist()]

    def metric(self) -> CloseMetric:
        return CloseMetric()

    def draw(self, image: Tensor, prediction: Mapping[str, Any], sample: Mapping[str, Any] | None = None) -> Tensor:
        return caption(enlarge(image)[0], [f"{prediction['brightness']:.2f}"])

    @staticmethod
    def draw_truth(sample: Mapping[str, Any], classes: Sequence[str]) -> tuple[Tensor, str]:
        return sample["image"].as_subclass(Tensor) // 2, f"{sample['brightness']:.2f}"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        return {"brightness": outputs.logits}

    def example_labels(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size)


class CloseMetric:
    """Fraction of the images whose brightness is predicted within 0.5."""

    def __init__(self) -> None:
        self.close: list[bool] = []

    def update(self, predictions: Sequence[dict], samples: Sequence[dict]) -> None:
        pairs = zip(predictions, samples, strict=True)
        self.close += [abs(prediction["brightness"] - sample["brightness"]) < 0.5 for prediction, sample in pairs]

    def compute(self) -> dict[str, float]:
        return {"close": sum(self.close) / len(self.close)}


class PlainTask(BrightnessTask):
    """A task as written before the package asked for more than the abstract methods; it still sets `unit`."""

    unit = "images"
    pipeline_tag = Task.pipeline_tag
    draw_truth = Task.draw_truth
    export_outputs = Task.export_outputs
    example_labels = Task.example_labels


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "brightness", BrightnessTask)
    monkeypatch.setitem(TASKS, "plain", PlainTask)


def bright_samples() -> list[dict]:
    return [{**sample, "brightness": float(sample["image"].float().mean()) / 255} for sample in samples()]


def model_of(type_name: str) -> AllInOneModel:
    torch.manual_seed(0)
    backbone = tiny_backbone()
    return AllInOneModel(backbone, {"light": build_task(type_name, "light", CLASSES, backbone, SIZE)})


def card_of(type_name: str) -> str:
    source = {"format": "class_folders", "images": "images"}
    task = {"type": type_name, "image_size": SIZE, "batch_size": 1, "train": source}
    backbone = {"stem": "conv", "config": TINY}
    config = RunConfig.model_validate({"name": "x", "model": {"backbone": backbone}, "tasks": {"light": task}})
    exported = ExportedTask(type=type_name, head=None, options={}, image_size=SIZE, classes=CLASSES)
    description = ModelDescription(backbone=BackboneConfig(config=TINY), tasks={"light": exported})
    return model_card(description, Origin(config), model_of(type_name))


def test_it_trains_predicts_and_is_drawn() -> None:
    model = model_of("brightness")
    task: Any = model.tasks["light"]
    outputs = model("light", **task.collate(bright_samples()))
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in task.parameters())
    predictions = task.predict(outputs, [SIZE] * 4)
    metric = task.metric()
    metric.update(predictions, bright_samples())
    assert 0 <= metric.compute()[task.main_metric] <= 1
    assert task.draw(bright_samples()[0]["image"], predictions[0]).shape[0] == 3
    assert task.to_json(predictions[0]) == predictions[0]


def test_preview_draws_its_truth() -> None:
    assert truth_drawer("brightness", "brightness") is BrightnessTask
    sample = bright_samples()[0]
    drawn = draw_sample(sample, CLASSES, BrightnessTask)
    assert torch.equal(drawn[:, 21:], (sample["image"] // 2).repeat_interleave(10, 1).repeat_interleave(10, 2))
    assert (drawn[:, :21] != 255).any()  # the line of text


def test_onnx_graphs_have_its_outputs(tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, *SIZE)
    model = model_of("brightness").eval()
    graph = TaskGraph(model, "light")
    assert torch.equal(graph(pixels)[0], model("light", pixels).logits) and graph.names == ["brightness"]
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    session = runtime.InferenceSession(write_onnx(model, "light", tmp_path / "light.onnx"))
    assert [output.name for output in session.get_outputs()] == ["brightness"]


def test_the_model_card_has_its_tag() -> None:
    card = card_of("brightness")
    assert "pipeline_tag: brightness-estimation" in card and "`light` (brightness, head" in card


def test_activations_of_its_loss_are_counted() -> None:
    model = model_of("brightness")
    with SavedBytes(model) as real:
        model("light", **BrightnessTask.collate(bright_samples()))
    with torch.device("meta"):
        empty = model_of("brightness")
    notes: list[str] = []
    assert activation_bytes(empty, {"light": 4}, torch.float32, False, notes)["light"] == pytest.approx(
        real.bytes, 0.15
    )
    assert notes == []


def test_a_task_with_the_abstract_methods_only_gets_the_defaults() -> None:
    model = model_of("plain").eval()
    graph = TaskGraph(model, "light")
    graph(torch.randn(1, 3, *SIZE))
    assert graph.names == ["logits"]
    assert "pipeline_tag" not in card_of("plain")
    assert truth_drawer("plain", "classification") is ClassificationTask  # it reads a data set of the package
    sample = bright_samples()[0]
    drawn = draw_sample(sample, CLASSES, truth_drawer("plain", "brightness or anything"))
    assert torch.equal(drawn[:, 21:], sample["image"].repeat_interleave(10, 1).repeat_interleave(10, 2))
    with torch.device("meta"):
        empty = model_of("plain")
    notes: list[str] = []
    assert activation_bytes(empty, {"light": 2}, torch.float32, False, notes)["light"] > 0
    assert notes == ["light: without the activations of the loss, which needs real labels"]
