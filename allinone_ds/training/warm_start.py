"""Start a run from the weights of another: its backbone, and the heads of the tasks that stayed the same."""

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
    """Copy the backbone of a run, and the head of every task whose name, class names and shapes are the same.

    Args:
        model: fresh; under ZeRO-3 it may be born partitioned, then every rank calls this.
        folder: of the run, or of one of its checkpoints.

    Returns:
        Names of the tasks whose heads start fresh.

    Raises:
        ConfigError: there is no run, or its backbone is another.
    """
    _, facts = read_run_files(folder)
    state, source = read_weights(folder)
    ours: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tuple(whole_shape(value)) for name, value in ours.items()}
    fits = {name for name, shape in shapes.items() if name in state and tuple(state[name].shape) == shape}
    wrong = [
        name for name in shapes if name.startswith("backbone.") and name in model.state_dict() and name not in fits
    ]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing"
        raise ConfigError(
            f"model.start_from: the backbone in {source} is another: {wrong[0]} is {found} there, "
            f"{shapes[wrong[0]]} here; give both runs the same model.backbone"
        )
    fresh = []
    taken = ["backbone."]
    for name, task in model.tasks.items():
        own = [key for key in model.state_dict() if key.startswith(f"tasks.{name}.")]
        same = facts.classes.get(name) == task.classes and all(key in fits for key in own)
        taken += [f"tasks.{name}."] if same else []
        fresh += [] if same else [name]
    for name, value in ours.items():
        if name in fits and name.startswith(tuple(taken)):
            with whole_on_rank_0(value):
                value.copy_(state[name])
    return fresh
