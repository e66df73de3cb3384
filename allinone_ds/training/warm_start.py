"""Initialize a run with the weights of an earlier run: its backbone, and the heads of unchanged tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from allinone_ds.errors import ConfigError
from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_folder.weights import read_weights
from allinone_ds.zero.params import whole_on_rank_0, whole_shape


@torch.no_grad()
def start_from(model: AllInOneModel, folder: str | Path) -> list[str]:
    """Copy the backbone of a run, and the head of each task whose name, classes and shapes are equal. Collective.

        untrained = start_from(model, "runs/first")     # names of the tasks whose heads were not copied

    Args:
        model: model of the new run; under ZeRO-3 its parameters may already be partitioned.
        folder: folder of the earlier run or of one of its checkpoints.

    Returns:
        Names of the tasks whose heads keep their random initialization.

    Raises:
        ConfigError: the folder is not that of a run, or its backbone differs.
    """
    _, facts = read_run_files(folder)
    state, source = read_weights(folder)
    tensors: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tuple(whole_shape(value)) for name, value in tensors.items()}
    fits = {name for name, shape in shapes.items() if name in state and tuple(state[name].shape) == shape}
    wrong = [n for n in shapes if n.startswith("backbone.") and n in model.state_dict() and n not in fits]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "absent"
        raise ConfigError(
            f"model.start_from: the backbone in {source} differs from this run's: {wrong[0]} is {found} there and "
            f"{shapes[wrong[0]]} in this run; use the same model.backbone"
        )
    untrained = []
    copied = ["backbone."]
    for name, task in model.tasks.items():
        own = [key for key in model.state_dict() if key.startswith(f"tasks.{name}.")]
        same = facts.classes.get(name) == task.classes and all(key in fits for key in own)
        if same:
            copied.append(f"tasks.{name}.")
        else:
            untrained.append(name)
    for name, value in tensors.items():
        if name in fits and name.startswith(tuple(copied)):
            with whole_on_rank_0(value):
                value.copy_(state[name])
    return untrained
