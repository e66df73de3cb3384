"""Use a trained run without DeepSpeed: load it, evaluate it, predict on images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from allinone_ds.data.base import BrokenSample
from allinone_ds.data.images import read_image
from allinone_ds.data.transforms import eval_transform, stack_images
from allinone_ds.models.model import AllInOneModel
from allinone_ds.strict import ConfigError
from allinone_ds.tasks.drawing import to_pil
from allinone_ds.training.build import build_model, open_test_data
from allinone_ds.training.config import RunConfig, read_run_files
from allinone_ds.training.evaluation import evaluate_tasks, tasks_of, to_device
from allinone_ds.training.folder import WEIGHTS_FILE, checkpoints
from allinone_ds.training.inference import predict_batch


def load_run(
    folder: str | Path, device: str | torch.device = "cpu", overrides: Sequence[str] = ()
) -> tuple[AllInOneModel, RunConfig]:
    """Load a trained model for evaluation; no DeepSpeed, no launcher.

    Args:
        folder: of a run (its final weights, or those of the last checkpoint when it has not ended) or of a checkpoint.
        device: where to put the model.
        overrides: dotted keys laid over the run's configuration.

    Returns:
        The model in evaluation mode, in float32, and the run's configuration.

    Raises:
        ConfigError: there are no weights in the folder.
    """
    config, facts = read_run_files(folder, overrides)
    places = [Path(folder), *reversed(checkpoints(folder))]
    weights = next((p / WEIGHTS_FILE for p in places if (p / WEIGHTS_FILE).is_file()), None)
    if weights is None:
        raise ConfigError(f"{folder}: no {WEIGHTS_FILE} in it or in its checkpoints")
    model = build_model(config, facts)
    state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(weights).items()}
    model.load_state_dict(state)
    return model.eval().to(device), config


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate_run(folder: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of a run's model on its test data, in this process.

    Args:
        folder: of the run.
        overrides: dotted keys laid over its configuration, for example ["tasks.seg.test_time.flip=true"].
    """
    device = default_device()
    model, config = load_run(folder, device, overrides)
    _, facts = read_run_files(folder)
    return evaluate_tasks(model, open_test_data(config, facts.classes), device)


@torch.no_grad()
def predict_images(
    folder: str | Path, images: Sequence[str | Path], output: str | Path, overrides: Sequence[str] = ()
) -> list[Path]:
    """Run every task of a run on images and write what it sees.

    Args:
        folder: of the run.
        images: image files.
        output: folder that gets NAME-TASK.png for every task and NAME.json, {task: prediction}, for every image.
        overrides: dotted keys laid over the run's configuration.

    Returns:
        The files written.

    Raises:
        ConfigError: an image cannot be read.
    """
    device = default_device()
    model, config = load_run(folder, device, overrides)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    names = _distinct_names([Path(image) for image in images])
    written: list[Path] = []
    for name, file in names.items():
        try:
            image = read_image(str(file))
        except BrokenSample as error:
            raise ConfigError(str(error)) from error
        sample = {"image": image, "path": str(file), "index": 0}
        found: dict[str, Any] = {}
        for task_name, task in tasks_of(model).items():
            transform = eval_transform(config.tasks[task_name].image_size)
            pixels = to_device(stack_images([transform(dict(sample))]), device)
            prediction = predict_batch(model, task, pixels, [sample], config.tasks[task_name].test_time)[0]
            found[task_name] = task.to_json(prediction)
            picture = output / f"{name}-{task_name}.png"
            to_pil(task.draw(image, prediction)).save(picture)
            written.append(picture)
        report = output / f"{name}.json"
        report.write_text(json.dumps({"image": str(file), **found}) + "\n")
        written.append(report)
    return written


def _distinct_names(files: list[Path]) -> dict[str, Path]:
    """Output names of the images: their stems, numbered where two are alike."""
    names: dict[str, Path] = {}
    for file in files:
        name, number = file.stem, 1
        while name in names:
            number += 1
            name = f"{file.stem}-{number}"
        names[name] = file
    return names
