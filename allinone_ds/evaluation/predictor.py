"""Use a trained model without DeepSpeed: load a run, evaluate it, predict on images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from allinone_ds.data.augmentation.transforms import eval_transform, stack_images
from allinone_ds.data.images import read_image, to_rgb
from allinone_ds.errors import BrokenSample, ConfigError
from allinone_ds.evaluation.evaluate import evaluate_tasks, tasks_of
from allinone_ds.evaluation.views import predict_batch
from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.build import build_model, open_test_data
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.weights import read_weights
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks import Prediction, Task
from allinone_ds.tasks.drawing import to_pil
from allinone_ds.tasks.test_time import TestTime

AnyImage = str | Path | Image.Image | Tensor
"""A file, a PIL image, or a uint8 RGB tensor (3, H, W)."""


class Predictor:
    """A trained model with what it needs to see images: resizing, normalisation, class names.

    Args:
        model: left in evaluation mode.

    Attributes:
        model: the `AllInOneModel`; `model(task, pixel_values)` gives raw outputs.
        backbone: its shared backbone; `backbone(pixel_values).feature_maps`.
        tasks: its tasks by name; `tasks["det"].classes` are class names by label.
    """

    def __init__(self, model: AllInOneModel) -> None:
        self.model = model.eval()
        self.tasks: dict[str, Task] = tasks_of(model)

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    def preprocess(self, images: Sequence[AnyImage], task: str | None = None) -> Tensor:
        """The network's input for a task: images resized (without padding) and normalised.

        Args:
            images: B images of any size.
            task: its name; None when there is one only.

        Returns:
            float32 (B, 3, H, W) on the model's device.

        Raises:
            ConfigError: an image cannot be read, or the task does not exist.
        """
        transform = eval_transform(self._task(task).image_size)
        samples = [transform({"image": open_image(image)}) for image in images]
        return stack_images(samples).to(next(self.model.parameters()).device)

    @torch.no_grad()
    def predict(
        self, images: Sequence[AnyImage] | AnyImage, task: str | None = None, test_time: TestTime | None = None
    ) -> list[Prediction]:
        """What a task finds in images, in pixels of the images as they were given.

        Args:
            images: one or several, of any size.
            task: its name; None when there is one only.
            test_time: further views (scales, flips, windows) to merge; None: the images as they are.

        Returns:
            One prediction an image. Detection: "boxes" (n, 4) XYXY, "scores" (n,), "labels" (n,), best first.
            Segmentation: "mask" (H, W) of labels. Classification: "label", "scores" (K,).
        """
        given = [images] if isinstance(images, str | Path | Image.Image | Tensor) else list(images)
        found = self._task(task)
        opened = [open_image(image) for image in given]
        pixels = self.preprocess(opened, task)
        return predict_batch(self.model, found, pixels, [{"image": image} for image in opened], test_time)

    def _task(self, name: str | None) -> Task:
        if name is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            raise ConfigError(f"task = {name!r}: {did_you_mean(str(name), self.tasks)}")
        return self.tasks[name]

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name}: {task.kind}" for name, task in self.tasks.items())
        return f"Predictor({type(self.backbone.net).__name__}; {tasks})"


def open_image(image: AnyImage) -> Tensor:
    """An image as uint8 RGB (3, H, W). A file becomes upright as its EXIF says, an opened picture stays as it is.

    Raises:
        ConfigError: it cannot be read, or the tensor is not uint8 (3, H, W).
    """
    if isinstance(image, str | Path):
        try:
            return read_image(str(image))
        except BrokenSample as error:
            raise ConfigError(str(error)) from error
    if isinstance(image, Image.Image):
        try:
            return tv_tensors.Image(torch.from_numpy(to_rgb(image)).permute(2, 0, 1))
        except ValueError as error:
            raise ConfigError(f"an image of mode {image.mode}: {error}") from error
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        raise ConfigError(f"an image tensor is uint8 (3, H, W) in RGB, found {image.dtype} {tuple(image.shape)}")
    return tv_tensors.Image(image)


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
    state, _ = read_weights(folder)
    model = build_model(config, facts)
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
    model, config = load_run(folder, default_device(), overrides)
    predictor = Predictor(model)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    names = _distinct_names([Path(image) for image in images])
    written: list[Path] = []
    for name, file in names.items():
        image = open_image(file)
        found: dict[str, Any] = {}
        for task_name, task in predictor.tasks.items():
            test_time = config.tasks[task_name].test_time
            prediction = predictor.predict(image, task_name, test_time)[0]
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
