"""Count the bytes that autograd keeps for the backward pass, in a real forward or in one on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from allinone_ds.model import AllInOneModel


def activation_bytes(
    model: AllInOneModel,
    batches: Mapping[str, int],
    dtype: torch.dtype,
    checkpointing: bool,
    notes: list[str],
    groups: Mapping[str, Sequence[str]] | None = None,
    every: int = 1,
    offload: bool = False,
) -> dict[str, int]:
    """Return the bytes that autograd keeps for the backward pass of one micro-step of each task or joint group.

    The forwards run on fake tensors, which have shapes but no memory. With activation checkpointing each layer of the
    backbone keeps only its input, and the activations of one layer exist at a time.

    Args:
        model: a model on the meta device; afterwards it has fake weights in `dtype`.
        batches: images per micro-batch by task.
        dtype: dtype of the weights.
        checkpointing: whether the backbone's layers are recomputed.
        notes: receives a line for each task whose loss or head is left out.
        groups: joint group -> its tasks, which share one forward of the backbone.
        every: with checkpointing, every n-th layer is recomputed.
        offload: with checkpointing, the inputs of these layers are in host memory.
    """
    counted = {}
    saved = partial(SavedBytes, model, every if checkpointing else 0, offload)
    model.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for name, count in batches.items():
            task: Any = model.tasks[name]
            example = task.example_labels(count)
            # some heads depend on values, which fake tensors lack: a matcher in the loss, a check for infinities
            for training, labels in ((True, example), (True, None), (False, None)):
                model.train(training)
                kept = saved()
                try:
                    with kept:
                        model(name, torch.empty(count, 3, *task.image_size), labels)
                except DataDependentOutputException:
                    continue
                counted[name] = kept.bytes
                if labels is None:
                    notes.append(f"{name}: without the activations of the loss, which needs real labels")
                break
            else:
                notes.append(f"{name}: without the activations of the head, which needs real images")
                counted[name] = _of_backbone(model, saved(), count, task)
        for group, names in (groups or {}).items():
            backbone = _of_backbone(model, saved(), batches[names[0]], model.tasks[names[0]])
            counted[group] = backbone + sum(counted.pop(name) - backbone for name in names)
    return counted


def _of_backbone(model: AllInOneModel, kept: SavedBytes, count: int, task: Any) -> int:
    with kept:
        model.train().backbone(torch.empty(count, 3, *task.image_size))
    return kept.bytes


class SavedBytes:
    """Context that counts the bytes of the tensors that autograd keeps: each storage once, and no weights.

    Args:
        model: the model that runs; its weights are not counted.
        checkpointed: count as if every n-th layer of the backbone were checkpointed; in fact none must be. 0: none is.
        offload: leave out the inputs of these layers.

    Attributes:
        bytes: bytes counted so far.
    """

    def __init__(self, model: AllInOneModel, checkpointed: int = 0, offload: bool = False) -> None:
        self._own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self._kept: dict[int, Any] = {}  # keeps storages alive, so that no address is used twice
        self._layer: int | None = None
        self._inside: list[int] = []
        self._inputs = 0
        self._outside = 0
        self._layers = _backbone_layers(model)[::checkpointed] if checkpointed else []
        self._offload = offload
        self._hooks: list[Any] = []

    @property
    def bytes(self) -> int:
        return self._outside + (0 if self._offload else self._inputs) + max(self._inside, default=0)

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
    """Return the layers that activation checkpointing recomputes."""
    return [m for m in model.backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
