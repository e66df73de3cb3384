"""How many bytes autograd keeps for a backward, of a real forward or of one on fake tensors, which have shapes only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from allinone_ds.model import AllInOneModel


def activation_bytes(
    model: AllInOneModel, batches: Mapping[str, int], dtype: torch.dtype, checkpointing: bool, notes: list[str]
) -> dict[str, int]:
    """Bytes that autograd keeps for the backward of one micro-step of each task.

    With activation checkpointing a layer of the backbone keeps its input alone, and one layer is whole at a time.

    Args:
        model: on the meta device; it is left there in `dtype`, with fake weights.
        batches: images of a micro-batch by task.
        dtype: of the weights.
        checkpointing: whether the backbone's layers are recomputed.
        notes: gets a line for each task whose loss is left out.
    """
    found = {}
    model.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for name, count in batches.items():
            task: Any = model.tasks[name]
            labels = _fake_labels(task, count)
            # some heads look at values: a matcher in the loss, a check for infinities in training
            for training, given in ((True, labels), (True, None), (False, None)):
                model.train(training)
                kept = SavedBytes(model, checkpointing)
                try:
                    with kept:
                        model(name, torch.empty(count, 3, *task.image_size), given)
                except DataDependentOutputException:
                    continue
                found[name] = kept.bytes
                if given is None:
                    notes.append(f"{name}: without the loss's own activations, which depend on values")
                break
            else:
                notes.append(f"{name}: its head's activations depend on values; only the backbone's are counted")
                kept = SavedBytes(model, checkpointing)
                with kept:
                    model.backbone(torch.empty(count, 3, *task.image_size))
                found[name] = kept.bytes
    return found


def _fake_labels(task: Any, count: int) -> Any:
    if task.kind == "segmentation":
        return torch.zeros(count, *task.image_size, dtype=torch.uint8)
    if task.kind == "classification":
        return torch.zeros(count, dtype=torch.long)
    return None


class SavedBytes:
    """Inside this context: the bytes of the tensors that autograd keeps, each storage once, weights not counted.

    Args:
        model: whose weights are not counted.
        checkpointing: count as if the layers of the backbone were checkpointed (they must not be).

    Attributes:
        bytes: how many.
    """

    def __init__(self, model: AllInOneModel, checkpointing: bool = False) -> None:
        self._own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self._kept: dict[int, Any] = {}  # storages stay alive, or their addresses would come again
        self._layer: int | None = None
        self._inside: list[int] = []
        self._inputs = 0
        self._outside = 0
        self._layers = _backbone_layers(model) if checkpointing else []
        self._hooks: list[Any] = []

    @property
    def bytes(self) -> int:
        return self._outside + self._inputs + max(self._inside, default=0)

    def __enter__(self) -> SavedBytes:
        for index, layer in enumerate(self._layers):
            self._inside.append(0)
            self._hooks.append(layer.register_forward_pre_hook(partial(self._enter_layer, index)))
            self._hooks.append(layer.register_forward_hook(self._leave_layer))
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._saving.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter_layer(self, index: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._layer = index
        storage = inputs[0].untyped_storage()
        if storage._cdata not in self._kept:
            self._kept[storage._cdata] = storage
            self._inputs += storage.nbytes()

    def _leave_layer(self, *_: Any) -> None:
        self._layer = None

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept and storage._cdata not in self._own:
            self._kept[storage._cdata] = storage
            if self._layer is None:
                self._outside += storage.nbytes()
            else:
                self._inside[self._layer] += storage.nbytes()
        return tensor


def _backbone_layers(model: AllInOneModel) -> list[nn.Module]:
    """The layers that activation checkpointing recomputes."""
    return [m for m in model.backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
