"""The outputs of ONNX graphs in onnxruntime equal those of PyTorch for any batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from allinone_ds import load
from allinone_ds.export.folders import export_run
from allinone_ds.export.onnx import TaskGraph, write_onnx
from allinone_ds.models.lora import is_adapter
from allinone_ds.run_folder.names import WEIGHTS_FILE
from tests.tiny_run import tiny_run

from . import untrained
from .untrained import LIGHT, WINNING, untrained_run

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
pytest.importorskip("onnxscript", reason="needs the extra `onnx`")


ONE_LAYER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}


@pytest.mark.parametrize(
    ("heads", "outputs"),
    [
        (LIGHT, {"det": ["boxes", "scores"], "seg": ["logits"], "cls": ["logits"]}),
        (WINNING, {"det": ["boxes", "scores"], "seg": ["scores"], "cls": ["logits"]}),
    ],
)
def test_graphs_equal_the_model(tmp_path: Path, heads: dict, outputs: dict[str, list[str]]) -> None:
    stem = "conv" if heads else "patch"
    model = untrained_run(tmp_path, stem, heads, config=ONE_LAYER)  # a graph grows with depth
    generator = torch.Generator().manual_seed(1)
    for name, names in outputs.items():
        session = onnxruntime.InferenceSession(write_onnx(model, name, tmp_path / f"{name}.onnx"))
        assert [value.name for value in session.get_inputs()] == ["pixel_values"]
        assert [value.name for value in session.get_outputs()] == names
        for batch in (1, 3):
            pixels = torch.randn(batch, 3, 32, 32, generator=generator)
            actual = session.run(None, {"pixel_values": pixels.numpy()})
            with torch.no_grad():
                expected = TaskGraph(model, name)(pixels)
            for ours, theirs in zip(actual, expected, strict=True):  # boxes in pixels, scores and logits around 1
                torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-3)


def test_the_graph_of_a_hierarchical_backbone_equals_the_model(tmp_path: Path) -> None:
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    heads = {name: {"image_size": 16} for name in ("det", "seg", "cls")}
    model = untrained_run(tmp_path, "patch", heads, model_type="swin", config=sizes)
    session = onnxruntime.InferenceSession(write_onnx(model, "seg", tmp_path / "seg.onnx"))
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = TaskGraph(model, "seg")(pixels)[0]
        actual = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_the_graph_of_a_task_with_adapters_of_its_own_equals_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of a task beside it, which has the shared ones alone."""

    def two_tasks(folder: Path) -> dict:
        content = tiny_run(folder)
        del content["tasks"]["det"]
        return content

    monkeypatch.setattr(untrained, "tiny_run", two_tasks)
    sizes = {name: {"image_size": 16} for name in ("seg", "cls")}
    untrained_run(home / "before", home=home, heads=sizes, config=ONE_LAYER)
    lora = {"lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]}, "start_from": str(home / "before")}
    heads = {**sizes, "cls": {**sizes["cls"], "lora": {"rank": 2}}}
    model = untrained_run(home / "run", home=home, heads=heads, model=lora, config=ONE_LAYER)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.3, generator=generator)
    save_file(model.state_dict(), home / "run" / WEIGHTS_FILE)
    export_run(home / "run", onnx=True)
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    plain = load(home / "before").model
    for name in ("seg", "cls"):
        session = onnxruntime.InferenceSession(home / "run" / "export" / "tasks" / name / "model.onnx")
        actual = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
        with torch.no_grad():
            expected, without = (TaskGraph(own, name)(pixels)[0] for own in (load(home / "run").model, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(expected, without, atol=0.05)


@pytest.mark.parametrize("heads", [LIGHT, WINNING])
def test_decoded_boxes_are_those_of_predict(tmp_path: Path, heads: dict) -> None:
    model = untrained_run(tmp_path, heads=heads)
    task = model.tasks["det"]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        boxes, scores = TaskGraph(model, "det")(pixels)
        predictions = task.predict(model("det", pixels), [(32, 32)] * 2)
    for row, prediction in enumerate(predictions):
        best = int(scores[row].max(dim=1).values.argmax())
        torch.testing.assert_close(scores[row].max(), prediction["scores"][0])
        torch.testing.assert_close(boxes[row, best].clamp(0, 32), prediction["boxes"][0])
        assert int(scores[row, best].argmax()) == int(prediction["labels"][0])
