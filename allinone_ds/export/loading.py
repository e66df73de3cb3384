"""`allinone_ds.load`: a model out of an exported folder, or straight out of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.predictor import Predictor, load_run
from allinone_ds.export.facts import FACTS_FILE, ExportFacts
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import build_backbone
from allinone_ds.run_folder.names import CONFIG_FILE, WEIGHTS_FILE
from allinone_ds.tasks import build_task


def load(folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Load a trained model; no DeepSpeed, no data, no hub.

        model = allinone_ds.load("runs/demo/export/tasks/detection")
        model.predict("street.jpg")     # [{"boxes": (n, 4), "scores": (n,), "labels": (n,)}]

    Args:
        folder: of one exported task, of the exported whole model, of a run or of a checkpoint.
        device: where to put the model.

    Returns:
        The model in evaluation mode, in float32, with its preprocessing and class names.

    Raises:
        ConfigError: the folder is none of these, or its files do not fit together.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        return Predictor(load_run(folder, device)[0])
    for name in (FACTS_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} in it; give a folder that `allinone-ds export` wrote, or a run's")
    model = build_exported(ExportFacts.read(folder))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        raise ConfigError(f"{folder}: {WEIGHTS_FILE} and {FACTS_FILE} do not fit together: {error}") from error
    return Predictor(model.to(device))


def build_exported(facts: ExportFacts) -> AllInOneModel:
    """The model that the facts describe, with fresh weights."""
    backbone = build_backbone(facts.backbone)
    tasks = {
        name: build_task(task.type, name, task.classes, backbone, task.image_size, task.head, task.options)
        for name, task in facts.tasks.items()
    }
    return AllInOneModel(backbone, tasks)
