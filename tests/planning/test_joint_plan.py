"""The activations of a joint group are those of one backbone and all heads."""

from __future__ import annotations

import torch

from allinone_ds.planning.activations import activation_bytes
from tests.tiny import tiny_model


def bytes_of(groups: dict[str, list[str]] | None = None) -> dict[str, int]:
    with torch.device("meta"):
        model = tiny_model()
    return activation_bytes(model, {"seg": 2, "cls": 2}, torch.float32, False, [], groups)


def test_a_group_keeps_the_activations_of_its_backbone_once() -> None:
    alone, joint = bytes_of(), bytes_of({"rooms": ["seg", "cls"]})
    assert list(joint) == ["rooms"]
    assert max(alone.values()) < joint["rooms"] < sum(alone.values())
    model = tiny_model()
    measured = torch.autograd.graph.saved_tensors_hooks
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage.nbytes())
        held.append(storage)
        return tensor

    held: list = []
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    labels = {name: model.tasks[name].example_labels(2) for name in ("seg", "cls")}
    with measured(pack, lambda tensor: tensor):
        model(["seg", "cls"], torch.empty(2, 3, 32, 32), labels)
    assert joint["rooms"] == sum(size for key, size in kept.items() if key not in own)
