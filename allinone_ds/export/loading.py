"""`allinone_ds.load`: a model from an exported folder, a run or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.predictor import Predictor, load_run, predictor_of
from allinone_ds.export.description import DESCRIPTION_FILE, ModelDescription
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import build_backbone
from allinone_ds.models.lora import add_lora
from allinone_ds.run_folder.names import CONFIG_FILE, WEIGHTS_FILE
from allinone_ds.tasks import build_task


def load(folder: str | Path, device: str | torch.device = "cpu", overrides: Sequence[str] = ()) -> Predictor:
    """Load a trained model, without DeepSpeed, data or network access.

    Args:
        folder: folder of an export, of one exported task, of a run or of a checkpoint.
        device: device of the model.
        overrides: dotted keys that replace values of a run's configuration; an exported folder has none.

    Returns:
        The model in evaluation mode, in float32, with its preprocessing and class names.

    Raises:
        ConfigError: the folder is none of these, or its weights do not fit its description, or overrides are given for
            an exported folder.

    Example::

        model = allinone_ds.load("runs/demo/export/tasks/detection")
        model.predict("street.jpg")    # [{"boxes": (n, 4), "scores": (n,), "labels": (n,)}]
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        model, config = load_run(folder, device, overrides)
        return predictor_of(model, config)
    if (folder / "model" / DESCRIPTION_FILE).is_file():  # a whole export
        folder = folder / "model"
    for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: has no {name}; give a folder that `allinone-ds export` wrote, or a run's")
    if overrides:
        raise ConfigError(
            f"{folder}: an exported folder has no configuration to override ({' '.join(overrides)}); give the run's "
            "folder"
        )
    description = ModelDescription.read(folder)
    model = build_exported(description)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        raise ConfigError(f"{folder}: {WEIGHTS_FILE} does not fit {DESCRIPTION_FILE}; export again: {error}") from error
    return Predictor(model.to(device), joint=description.joint)


def build_exported(description: ModelDescription) -> AllInOneModel:
    """Return the described model with freshly initialised weights."""
    backbone = build_backbone(description.backbone)
    if description.lora is not None:
        add_lora(backbone, description.lora)
    for name, task in description.tasks.items():
        if task.lora is not None:
            add_lora(backbone, task.lora, name)
    tasks = {
        name: build_task(task.type, name, task.classes, backbone, task.image_size, task.head, task.options)
        for name, task in description.tasks.items()
    }
    return AllInOneModel(backbone, tasks)
