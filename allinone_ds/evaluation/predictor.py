"""Use of a trained model without DeepSpeed: load a run, evaluate it, predict on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from allinone_ds.data.augmentation.transforms import eval_transform, stack_images
from allinone_ds.data.loading.task_data import Joint
from allinone_ds.errors import BrokenSample, ConfigError
from allinone_ds.evaluation.evaluate import evaluate_tasks, tasks_of
from allinone_ds.evaluation.inputs import AnyImage, find_inputs, grouped, is_video, open_image
from allinone_ds.evaluation.metrics import Evaluation
from allinone_ds.evaluation.results import Results
from allinone_ds.evaluation.video import Frame, check_every, read_frames
from allinone_ds.evaluation.views import predict_batch, predict_group
from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.build import build_model, open_test_data
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.weights import read_weights
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks import Prediction, Sample, Task
from allinone_ds.tasks.test_time import TestTime

_BATCH = 8
"""Images per forward of `predict_images`."""


class Predictor:
    """A model with its preprocessing and class names. `allinone_ds.load` returns one.

    Args:
        model: the model; it is set to evaluation mode.
        test_time: the views that its run's configuration gives per task, which predictions are merged from.
        joint: joint group -> its tasks, which `predict_images` runs in one forward and draws on one sheet.

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

    def __init__(
        self,
        model: AllInOneModel,
        test_time: Mapping[str, TestTime | None] | None = None,
        joint: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model = model.eval()
        self.joint = {group: tuple(tasks) for group, tasks in (joint or {}).items()}
        self.tasks: dict[str, Task] = tasks_of(model)
        self.test_time = dict(test_time or {})

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
        self,
        images: Iterable[AnyImage] | AnyImage,
        task: str | None = None,
        test_time: TestTime | None | Literal["run"] = "run",
        threshold: float | None = None,
    ) -> list[Prediction]:
        """Return a task's predictions for images, in the coordinates of the original images.

        Args:
            images: one image or several, of any size: files, PIL images, uint8 RGB arrays (H, W, 3), or uint8 RGB
                tensors (3, H, W).
            task: name of the task; None if the model has only one.
            test_time: views (scales, flips, windows) whose predictions are merged; "run": those of the run's file, none
                for an export; None: the images as they are.
            threshold: detection: lowest score of the boxes that are returned, 0..1; None: all that the head gives.

        Returns:
            One prediction per image. Detection: "boxes" (n, 4) XYXY in pixels, "scores" (n,) and "labels" (n,), highest
            score first. Segmentation: "mask" (H, W) of labels. Classification: "label" and "scores" (K,).

        Raises:
            ConfigError: an image cannot be read, or the model has no such task, or it cannot merge views, or its
                predictions have no score to compare with a threshold.
        """
        chosen = self._task(task)
        one = isinstance(images, str | Path | Image.Image | Tensor | np.ndarray)
        several: list[AnyImage] = [images] if one else list(images)  # type: ignore[list-item, arg-type]
        if not several:
            return []
        samples: list[Sample] = [{"image": open_image(image)} for image in several]
        pixels = self.preprocess([sample["image"] for sample in samples], task)
        views = self.test_time.get(chosen.name) if test_time == "run" else test_time
        predictions = predict_batch(self.model, chosen, pixels, samples, views)
        return predictions if threshold is None else [chosen.at_least(p, threshold) for p in predictions]

    def predict_tasks(self, images: Sequence[AnyImage], tasks: Sequence[str] = ()) -> dict[str, list[Prediction]]:
        """Return task -> its predictions for images, from one forward of the backbone for the tasks of a joint group.

        Tasks with views in the run's configuration merge them, in forwards of their own.

        Args:
            images: B images of any size.
            tasks: names of the tasks; none: all.

        Raises:
            ConfigError: an image cannot be read, or the model has no such task.
        """
        chosen = {name: self._task(name) for name in tasks or self.tasks}
        if not images:
            return {name: [] for name in chosen}
        opened = [open_image(image) for image in images]
        samples: list[Sample] = [{"image": image} for image in opened]
        found: dict[str, list[Prediction]] = {}
        for group, names in self.joint.items():
            together = [chosen[name] for name in names if name in chosen]
            if together:
                views = {name: views for name, views in self.test_time.items() if views is not None}
                pixels = self.preprocess(opened, together[0].name)
                joint = Joint(tuple(task.name for task in together), test_time=views)
                found |= predict_group(self.model, group, together, pixels, samples, joint)
        found |= {name: self.predict(opened, name, self.test_time.get(name)) for name in chosen if name not in found}
        return {name: found[name] for name in chosen}

    def predict_video(
        self, video: str | Path, task: str | None = None, every: int = 1, threshold: float | None = None
    ) -> Iterator[tuple[Frame, Prediction]]:
        """Yield the frames of a video, one after the other, each with a task's prediction.

        Args:
            video: the file; it is read with PyAV (`pip install 'allinone_ds[video]'`).
            task: name of the task; None if the model has only one.
            every: predict only each `every`-th frame, from the first on.
            threshold: see `predict`.

        Raises:
            ConfigError: the model has no such task, `every` is below 1, or PyAV is not installed.
            BrokenSample: the file is not a video, or is damaged.

        Example::

            for frame, prediction in allinone_ds.load("runs/demo").predict_video("drive.mp4", "detection", every=5):
                print(frame.seconds, len(prediction["boxes"]))
        """
        check_every(every)
        name = self._task(task).name
        return ((f, self.predict([f.image], name, threshold=threshold)[0]) for f in read_frames(Path(video), every))

    def _task(self, name: str | None) -> Task:
        if name is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        if name is None:
            raise ConfigError(f"the model has {len(self.tasks)} tasks; give task= one of {', '.join(self.tasks)}")
        if name not in self.tasks:
            raise ConfigError(f"task = {name!r}: {did_you_mean(str(name), self.tasks)}")
        return self.tasks[name]

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name}: {task.kind}" for name, task in self.tasks.items())
        return f"Predictor({type(self.backbone.net).__name__}; {tasks})"


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


def predictor_of(model: AllInOneModel, config: RunConfig) -> Predictor:
    """Return the predictor of a run's model, with the views and joint groups of its configuration."""
    test_time = {name: task.test_time for name, task in config.tasks.items()}
    return Predictor(model, test_time, {name: group.tasks for name, group in config.joint.items()})


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
    model: str | Path | Predictor,
    images: Sequence[str | Path],
    output: str | Path,
    overrides: Sequence[str] = (),
    tasks: Sequence[str] = (),
    threshold: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    every: int = 1,
) -> list[Path]:
    """Run tasks of a model on images and videos and write the predictions.

    Args:
        model: folder of a run or of a checkpoint, or what `allinone_ds.load` returned.
        images: image and video files, folders of them, and patterns such as "photos/*.jpg".
        output: folder for the results: predictions.jsonl with one line per image or frame (task -> prediction); for
            every image NAME.json with the same content, NAME-TASK.png per task and NAME-GROUP.png per joint group of
            which all tasks run; for a video NAME-TASK.mp4.
        overrides: dotted keys that replace values of the run's configuration.
        tasks: names of the tasks; none: all.
        threshold: lowest score of the boxes that are drawn and written, 0..1; None: that of the task.
        progress: is called with the number of inputs done, that of all inputs, and what is read next.
        every: of videos, only each `every`-th frame is predicted and drawn.

    Returns:
        The files written for single inputs.

    Raises:
        ConfigError: inputs cannot be read. They are named when all others are written. Or the model has no such task,
            or none of the tasks has scores to compare with the threshold.

    Example::

        predict_images("runs/demo", ["street.jpg"], "out")    # out/street.json, out/street-detection.png, ...
    """
    if isinstance(model, Predictor):
        predictor = model
    else:
        loaded, config = load_run(model, default_device(), overrides)
        predictor = predictor_of(loaded, config)
    chosen = {name: predictor._task(name) for name in tasks or predictor.tasks}
    if threshold is not None:
        _set_threshold(list(chosen.values()), threshold)
    check_every(every)
    output = Path(output)
    groups = {group: names for group, names in predictor.joint.items() if set(names) <= set(chosen)}
    inputs, failed = find_inputs(images, [*chosen, *groups], output)
    total = len(inputs) + len(failed)
    if not inputs:
        raise _unread(failed, total)
    done = 0
    with Results(output, chosen, groups, every) as results:
        for group in grouped(inputs, _BATCH):
            if progress:
                progress(done, total, str(group[0].file))
            if is_video(group[0].file):
                try:
                    for frame in read_frames(group[0].file, every):
                        found = predictor.predict_tasks([frame.image], list(chosen))
                        results.add_frame(group[0], frame, {name: of_task[0] for name, of_task in found.items()})
                        if progress:
                            progress(done, total, f"{group[0].file}, frame {frame.number}")
                except (BrokenSample, ConfigError) as error:
                    failed[str(group[0].file)] = _reason(error)
                results.end_video()
            else:
                opened = {}
                for item in group:
                    try:
                        opened[item.name] = item, open_image(item.file)
                    except ConfigError as error:
                        failed[str(item.file)] = _reason(error)
                pixels = [image for _, image in opened.values()]
                by_task = predictor.predict_tasks(pixels, list(chosen))
                for i, (item, image) in enumerate(opened.values()):
                    results.add_image(item, image, {name: found[i] for name, found in by_task.items()})
            done += len(group)
    if failed:
        raise _unread(failed, total)
    return results.written


def _set_threshold(tasks: Sequence[Task], threshold: float) -> None:
    """Draw and write predictions from this score on, in the tasks that have scores."""
    scored = [task for task in tasks if task.shown_score is not None]
    if not scored:
        kinds = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
        raise ConfigError(f"threshold {threshold}: no prediction of {kinds} has a score to compare; leave it out")
    for task in scored:
        task.check_threshold(threshold)
        task.shown_score = threshold


def _reason(error: BrokenSample | ConfigError) -> str:
    return error.reason if isinstance(error, BrokenSample) else str(error)


def _unread(failed: Mapping[str, str], total: int) -> ConfigError:
    lines = [f"  {reason if reason.startswith(item) else f'{item}: {reason}'}" for item, reason in failed.items()]
    return ConfigError("\n".join([f"{len(failed)} of {total} inputs could not be predicted:", *lines]))
