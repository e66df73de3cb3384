"""Use of a trained model without DeepSpeed: load a run, evaluate it, predict on images."""

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
from allinone_ds.evaluation.metrics import Evaluation
from allinone_ds.evaluation.views import predict_batch
from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.build import build_model, open_test_data
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.weights import read_weights
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks import Prediction, Sample, Task
from allinone_ds.tasks.drawing import to_pil
from allinone_ds.tasks.test_time import TestTime

AnyImage = str | Path | Image.Image | Tensor
"""An image file, a PIL image, or a uint8 RGB tensor (3, H, W)."""


class Predictor:
    """A model with its preprocessing and class names. `allinone_ds.load` returns one.

    Args:
        model: the model; it is set to evaluation mode.

    Attributes:
        model: the `AllInOneModel`; `model(task, pixel_values)` returns raw outputs.
        backbone: its shared backbone; `backbone(pixel_values).feature_maps` are its features.
        tasks: its tasks by name; `tasks["det"].classes` are the class names in the order of labels.

    Example:
        >>> from allinone_ds.models.backbone import BackboneConfig, build_backbone
        >>> from allinone_ds.tasks import build_task
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
        >>> backbone = build_backbone(BackboneConfig(config={**sizes, "image_size": 32}))
        >>> task = build_task("classification", "pets", ["cat", "dog"], backbone, (32, 32), "linear", {})
        >>> predictor = Predictor(AllInOneModel(backbone, {"pets": task}))
        >>> prediction = predictor.predict(torch.zeros(3, 48, 64, dtype=torch.uint8))[0]
        >>> prediction["label"] in (0, 1), prediction["scores"].shape
        (True, torch.Size([2]))
    """

    def __init__(self, model: AllInOneModel) -> None:
        self.model = model.eval()
        self.tasks: dict[str, Task] = tasks_of(model)

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    def preprocess(self, images: Sequence[AnyImage], task: str | None = None) -> Tensor:
        """Return the network's input for a task: the images resized (without padding) and normalised.

        Args:
            images: B images of any size.
            task: name of the task; None if the model has only one.

        Returns:
            float32 (B, 3, H, W) on the model's device.

        Raises:
            ConfigError: an image cannot be read, or the model has no such task.
        """
        transform = eval_transform(self._task(task).image_size)
        samples = [transform({"image": open_image(image)}) for image in images]
        return stack_images(samples).to(next(self.model.parameters()).device)

    @torch.no_grad()
    def predict(
        self, images: Sequence[AnyImage] | AnyImage, task: str | None = None, test_time: TestTime | None = None
    ) -> list[Prediction]:
        """Return a task's predictions for images, in the coordinates of the original images.

        Args:
            images: one image or several, of any size.
            task: name of the task; None if the model has only one.
            test_time: views (scales, flips, windows) whose predictions are merged; None: the images as they are.

        Returns:
            One prediction per image. Detection: "boxes" (n, 4) XYXY in pixels, "scores" (n,) and "labels" (n,), highest
            score first. Segmentation: "mask" (H, W) of labels. Classification: "label" and "scores" (K,).

        Raises:
            ConfigError: an image cannot be read, or the model has no such task, or it cannot merge views.
        """
        chosen = self._task(task)
        several = [images] if isinstance(images, str | Path | Image.Image | Tensor) else list(images)
        samples: list[Sample] = [{"image": open_image(image)} for image in several]
        pixels = self.preprocess([sample["image"] for sample in samples], task)
        return predict_batch(self.model, chosen, pixels, samples, test_time)

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
    """Return an image as uint8 RGB (3, H, W). A file is rotated as its EXIF data says, an opened image is not.

    Raises:
        ConfigError: the image cannot be read, or the tensor is not uint8 (3, H, W).

    Example:
        >>> open_image(Image.new("L", (64, 48))).shape
        torch.Size([3, 48, 64])
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
            raise ConfigError(f"image of mode {image.mode}: {error}") from error
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        raise ConfigError(f"image tensor of {image.dtype} {tuple(image.shape)}; give uint8 (3, H, W) in RGB")
    return tv_tensors.Image(image)


def load_run(
    folder: str | Path, device: str | torch.device = "cpu", overrides: Sequence[str] = ()
) -> tuple[AllInOneModel, RunConfig]:
    """Load a trained model for evaluation, without DeepSpeed and without a launcher.

    Args:
        folder: folder of a run (its final weights, or those of its last checkpoint if it has not ended) or of a
            checkpoint.
        device: device of the model.
        overrides: dotted keys that replace values of the run's configuration.

    Returns:
        The model in evaluation mode, in float32, and the run's configuration.

    Raises:
        ConfigError: there are no weights in the folder.

    Example::

        model, config = load_run("runs/demo", overrides=["data_root=/other/data"])
    """
    config, facts = read_run_files(folder, overrides)
    state, _ = read_weights(folder)
    model = build_model(config, facts)
    model.load_state_dict(state)
    return model.eval().to(device), config


def default_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate_run(folder: str | Path, overrides: Sequence[str] = ()) -> Evaluation:
    """Return the metrics of a run's model on its test data, computed in this process.

    Args:
        folder: folder of a run or of a checkpoint.
        overrides: dotted keys that replace values of the run's configuration.

    Example::

        evaluate_run("runs/demo", ["tasks.segmentation.test_time.flip=true"]).tasks["segmentation"]["miou"]
    """
    device = default_device()
    model, config = load_run(folder, device, overrides)
    classes = {name: task.classes for name, task in tasks_of(model).items()}
    return evaluate_tasks(model, open_test_data(config, classes), device)


def predict_images(
    folder: str | Path, images: Sequence[str | Path], output: str | Path, overrides: Sequence[str] = ()
) -> list[Path]:
    """Run every task of a run on images and write the predictions.

    Args:
        folder: folder of a run or of a checkpoint.
        images: image files.
        output: folder for the results: for every image NAME.json (task -> prediction), and NAME-TASK.png per task.
        overrides: dotted keys that replace values of the run's configuration.

    Returns:
        The files written.

    Raises:
        ConfigError: an image cannot be read.

    Example::

        predict_images("runs/demo", ["street.jpg"], "out")    # out/street.json, out/street-detection.png, ...
    """
    model, config = load_run(folder, default_device(), overrides)
    predictor = Predictor(model)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    names = _distinct_names([Path(image) for image in images])
    written: list[Path] = []
    for name, file in names.items():
        image = open_image(file)
        predictions: dict[str, Any] = {}
        for task_name, task in predictor.tasks.items():
            test_time = config.tasks[task_name].test_time
            prediction = predictor.predict(image, task_name, test_time)[0]
            predictions[task_name] = task.to_json(prediction)
            picture = output / f"{name}-{task_name}.png"
            to_pil(task.draw(image, prediction)).save(picture)
            written.append(picture)
        report = output / f"{name}.json"
        report.write_text(json.dumps({"image": str(file), **predictions}) + "\n")
        written.append(report)
    return written


def _distinct_names(files: list[Path]) -> dict[str, Path]:
    """Return output name -> image file: the file's stem, with a number if an earlier file has the same stem."""
    names: dict[str, Path] = {}
    for file in files:
        name, number = file.stem, 1
        while name in names:
            number += 1
            name = f"{file.stem}-{number}"
        names[name] = file
    return names
