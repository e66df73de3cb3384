"""Initialize a run with the weights of an earlier run, and say which weights a run starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, PreTrainedConfig, TrainerCallback

from allinone_ds.distributed import rank
from allinone_ds.errors import ConfigError
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.models.lora import SHARED, adapter_of, is_adapter, name_without_lora
from allinone_ds.models.pretrained import LoadedWeights
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_folder.weights import open_weights, shapes_of
from allinone_ds.zero.params import is_partitioned, whole_on_rank_0, whole_shape

_DERIVED = ("out_indices", "out_features", "stage_names", "dtype", "architectures", "transformers_version")
"""Settings of a backbone that do not change what its weights compute."""


@torch.no_grad()
def start_from(model: AllInOneModel, folder: str | Path) -> list[str]:
    """Copy the backbone of a run, and the head of each task whose name, classes and shapes are equal. Collective.

        untrained = start_from(model, "runs/first")     # names of the tasks whose heads were not copied

    Args:
        model: model of the new run; under ZeRO-3 its parameters may already be partitioned. Its `backbone.loaded` then
            says what was copied.
        folder: folder of the earlier run or of one of its checkpoints.

    Returns:
        Names of the tasks whose heads keep their random initialization.

    Raises:
        ConfigError: the folder is not that of a run, or its backbone differs.
    """
    _, facts = read_run_files(folder)
    state, source = open_weights(folder)
    saved = shapes_of(state)
    named = dict(model.named_parameters(remove_duplicate=False))
    tensors: dict[str, Any] = {**named, **dict(model.named_buffers())}
    adapted = any(is_adapter(name) for name in saved)
    theirs = {name: name if adapted else name_without_lora(name) for name in (*tensors, *model.state_dict())}
    shapes = {name: tuple(whole_shape(value)) for name, value in tensors.items()}
    fits = {name for name, shape in shapes.items() if saved.get(theirs[name]) == shape}
    kept = set(model.state_dict())
    wrong = [n for n in shapes if n.startswith("backbone.") and n in kept and n not in fits and not is_adapter(n)]
    if wrong and adapted:
        raise ConfigError(
            f"model.start_from: the backbone in {source} has LoRA adapters, which this run's model.lora lacks; set the "
            "same model.lora, or export that run and set model.backbone.checkpoint to its OUTPUT/backbone"
        )
    if wrong:
        found = saved.get(theirs[wrong[0]], "absent")
        raise ConfigError(
            f"model.start_from: the backbone in {source} differs from this run's: {wrong[0]} is {found} there and "
            f"{shapes[wrong[0]]} in this run; use the same model.backbone"
        )
    untrained = []
    copied = ["backbone."]
    adapters = {None, SHARED}
    for name, task in model.tasks.items():
        own = [key for key in kept if key.startswith(f"tasks.{name}.")]
        same = facts.classes.get(name) == task.classes and all(key in fits for key in own)
        if same:
            copied.append(f"tasks.{name}.")
            adapters.add(name)
        else:
            untrained.append(name)
    for name, value in tensors.items():
        if name in fits and name.startswith(tuple(copied)) and adapter_of(name) in adapters:
            with whole_on_rank_0(value):  # which keeps the values of rank 0 where the parameter is partitioned
                if rank() == 0 or not is_partitioned(value):
                    value.copy_(state[theirs[name]])
    model.backbone.loaded = LoadedWeights(
        str(source),
        total=len(kept),
        missing=tuple(sorted(name for name in kept if not name.startswith(tuple(copied)))),
        unexpected=tuple(sorted(set(saved) - {theirs[name] for name in kept})),
        changed=_changed(model.config, facts.backbone),
        option="model.start_from",
    )
    return untrained


def _changed(mine: PreTrainedConfig, earlier: BackboneConfig) -> tuple[str, ...]:
    """Return settings that differ from the earlier backbone's and that no shape shows, such as attention heads."""
    here = mine.to_dict()
    there = AutoConfig.for_model(earlier.model_type, **earlier.config).to_dict()
    return tuple(
        f"config.{key} = {here.get(key)} ({there.get(key)} there)"
        for key in sorted(set(here) | set(there))
        if here.get(key) != there.get(key) and not key.startswith("_") and "drop" not in key and key not in _DERIVED
    )


class StartedTrainer(Protocol):
    """What `StartReport` uses of an `AllInOneTrainer`."""

    model: Any

    def warn(self, step: int, message: str) -> None: ...
    def note(self, step: int, message: str) -> None: ...


class StartReport(TrainerCallback):
    """Says at the start of a run how many tensors came from a checkpoint or an earlier run; a warning if not all did.

    Args:
        trainer: its model's `backbone.loaded` is read.
        notes: further texts.
    """

    def __init__(self, trainer: StartedTrainer, notes: Sequence[str] = ()) -> None:
        self.trainer = trainer
        self.notes = notes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loaded = getattr(self.trainer.model.backbone, "loaded", None)  # a backbone of the user's may not say
        if state.global_step:  # a resumed run has the weights of its own checkpoint
            return
        for note in self.notes:
            self.trainer.note(0, note)
        if loaded is not None:
            say = self.trainer.note if loaded.complete else self.trainer.warn
            say(0, str(loaded))
