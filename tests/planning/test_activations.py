"""Planned activations against real forward passes."""

from __future__ import annotations

import pytest
import torch

from allinone_ds.planning.activations import SavedBytes, activation_bytes
from tests.tasks.heads import HEADS
from tests.tiny import samples, tiny_model

BACKBONE = {"hidden_size": 64, "num_hidden_layers": 4}
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("head", "dtype", "model_type"),
    [
        ("fcos", BF16, "dinov2"),
        ("rf_detr", F32, "dinov2"),
        ("light", BF16, "dinov2"),
        ("upernet", F32, "dinov2"),
        ("mask2former", BF16, "dinov2"),
        ("linear", F32, "dinov3_vit"),
        ("arcface", BF16, "vitdet"),
    ],
)
def test_activations_are_within_15_percent_of_a_real_forward(head: str, dtype: torch.dtype, model_type: str) -> None:
    name, kind, options = HEADS[head]
    model = tiny_model({name: (kind, options)}, model_type=model_type, **BACKBONE).to(dtype)
    with SavedBytes(model) as real:
        model(name, **model.tasks[name].collate(samples(4)))
    with torch.device("meta"):
        empty = tiny_model({name: (kind, options)}, model_type=model_type, **BACKBONE)
    planned = activation_bytes(empty, {name: 4}, dtype, False, [])
    assert planned[name] == pytest.approx(real.bytes, rel=0.15)


def test_checkpointing_leaves_the_layers_inputs_and_one_layer() -> None:
    pixels = torch.randn(4, 3, 32, 32)
    model = tiny_model(**BACKBONE)

    def planned_bytes(every: int, offload: bool = False) -> int:
        with SavedBytes(model, every, offload) as planned:
            model("cls", pixels)
        return planned.bytes

    with SavedBytes(model) as whole:
        model("cls", pixels)
    layer = model.backbone.net.get_submodule("layer.0" if hasattr(model.backbone.net, "layer") else "encoder.layer.0")
    tokens = torch.randn(4, 65, 64, requires_grad=True)
    with SavedBytes(model) as one:
        layer(tokens)
    inputs = 4 * tokens.nbytes
    outside = whole.bytes - 4 * one.bytes
    assert planned_bytes(1) == pytest.approx(outside + inputs + one.bytes, rel=0.15)
    assert planned_bytes(1) < 0.6 * whole.bytes
    assert planned_bytes(2) == pytest.approx(outside + inputs / 2 + 3 * one.bytes, rel=0.15)
    assert planned_bytes(1, offload=True) == planned_bytes(1) - inputs
