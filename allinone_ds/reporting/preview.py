"""Contact sheets of augmentation: one row per branch, one column per training sample, with the truth drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from allinone_ds.data.augmentation.transforms import eval_transform, train_transform
from allinone_ds.data.base import Sample, SampleDataset
from allinone_ds.data.joint.dataset import JointDataset, view_of
from allinone_ds.data.loading.further_samples import FurtherSamples
from allinone_ds.data.loading.random_state import own_random_state, seed_all
from allinone_ds.data.loading.schedule import Draw, Schedule
from allinone_ds.data.sources import open_source
from allinone_ds.errors import BrokenSample, ConfigError, DataError
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.tasks import TASKS, Task, task_class
from allinone_ds.tasks.drawing import FONT, FONT_SIZE, in_rows, to_pil

_CELL = 320  # longer side of one picture in pixels
_COLUMNS = 4  # pictures of the tasks of a joint group in a row
_GAP = 6  # pixels between pictures
_LINE = FONT_SIZE + 8  # height of a line of text in pixels


def preview_run(config: RunConfig, output: Path, samples: int) -> list[Path]:
    """Draw the first samples of the run as each branch of each task's augmentation transforms them.

    The samples of a joint group have the truth of all its tasks side by side, dark where a task has none.

    The first row shows the samples after the plain resize. Pixels of a mask without a class (255) are dark.

    Args:
        config: the run; only its training data is read.
        output: NAME.png stands for one NAME-TASK.png per task, and one NAME-GROUP.png per joint group.
        samples: number of columns.

    Returns:
        The files written.

    Raises:
        ConfigError: `output` does not end in .png, .jpg or .jpeg.
        DataError: the training data cannot be used.
    """
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--output {output}: the name must end in .png, .jpg or .jpeg")
    output.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name, images in config.images.items():
        dataset = open_source(images.train_source, config.data_root)
        draw_truth = _drawer(config, name, dataset)
        seed = config.trainer.get("data_seed")
        seed = config.trainer.get("seed", 42) if seed is None else seed  # 42 is Trainer's default
        chosen = _readable(dataset, Schedule(seed, {name: len(dataset)}, {name: (1, 1)}, 1), name, samples)
        plain = eval_transform(images.image_size)
        rows = [("plain resize", [draw_truth(plain(sample)) for _, sample in chosen])]
        transform = train_transform(images.augment, images.image_size, dataset.kind)
        with own_random_state():
            for branch, probability in transform.probabilities.items():
                transform_of_branch, pictures = transform.only(branch), []
                for draw, sample in chosen:
                    seed_all(draw.seed)
                    further = FurtherSamples(dataset, [], config.max_broken_images)
                    pictures.append(draw_truth(transform_of_branch(sample, further)))
                rows.append((f"{branch}: {probability:.0%} of the samples", pictures))
        file = output.with_name(f"{output.stem}-{name}{output.suffix}")
        _sheet(rows).save(file)
        written.append(file)
    return written


def _drawer(config: RunConfig, name: str, dataset: SampleDataset) -> Callable[[Sample], Tensor]:
    """Return what draws the truth of a transformed sample of a task, or that of all tasks of a joint group."""
    if not isinstance(dataset, JointDataset):
        drawer = truth_drawer(config.tasks[name].type, dataset.kind)
        return lambda sample: draw_sample(sample, dataset.classes, drawer)
    drawers = {task: truth_drawer(config.tasks[task].type, dataset.kinds[task]) for task in config.joint[name].tasks}

    def draw_all(sample: Sample) -> Tensor:
        pictures = []
        for task, drawer in drawers.items():
            if task in sample["targets"]:
                pictures.append(draw_sample(view_of(sample, task), dataset.classes_of[task], drawer, f"{task}: "))
            else:
                dark = {"image": tv_tensors.Image(sample["image"].as_subclass(Tensor) // 4)}
                pictures.append(draw_sample(dark, [], None, f"{task}: no label"))
        return in_rows(pictures, _COLUMNS * _CELL)

    return draw_all


def _readable(dataset: SampleDataset, schedule: Schedule, task: str, count: int) -> list[tuple[Draw, Sample]]:
    """Return the first `count` samples that can be read, in the order of the run's schedule."""
    readable: list[tuple[Draw, Sample]] = []
    for position in range(len(dataset)):
        draw = schedule.at(task, position)
        try:
            readable.append((draw, dataset[draw.index]))
        except BrokenSample:
            continue
        if len(readable) == count:
            break
    if not readable:
        raise DataError(f"{dataset.name}: none of {len(dataset)} samples can be read; repair them")
    return readable


def truth_drawer(type_name: str, kind: str) -> type[Task]:
    """Return the class whose `draw_truth` draws the samples of a task.

    This is the task's own class, or that of the package for this kind of data set if it has no `draw_truth` of its own.

    Args:
        type_name: type of the task in the run's YAML file.
        kind: kind of the data set.
    """
    task = task_class(type_name)
    return TASKS.get(kind, task) if task.draw_truth is Task.draw_truth else task


def draw_sample(sample: Sample, classes: list[str], drawer: type[Task] | None, title: str = "") -> Tensor:
    """Return a transformed sample as a picture, uint8 (3, h, w), whose longer side has a fixed length.

    Args:
        sample: the sample; everything in it that is a `tv_tensors` is resized to the picture.
        classes: class names of its data set.
        drawer: the class whose `draw_truth` draws it; None draws nothing.
        title: beginning of the line of text above the picture.
    """
    height, width = sample["image"].shape[-2:]
    factor = _CELL / max(height, width)
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    small = max(height, width) < _CELL  # pixels stay sharp squares
    interpolation = InterpolationMode.NEAREST if small else InterpolationMode.BILINEAR
    resized = dict(sample)
    for key, value in sample.items():
        if isinstance(value, tv_tensors.TVTensor):
            resized[key] = F.resize(value, size, interpolation, antialias=not small)
    drawn, text = (resized["image"].as_subclass(Tensor), "") if drawer is None else drawer.draw_truth(resized, classes)
    return _titled(drawn, title + text)


def _titled(image: Tensor, text: str) -> Tensor:
    """Return the image with a line of text above it, which is shortened to the image's width."""
    height, width = image.shape[-2:]
    canvas = Image.new("RGB", (width, height + _LINE), "white")
    font = ImageFont.truetype(FONT, FONT_SIZE)
    while text and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…" if len(text) > 2 else ""
    ImageDraw.Draw(canvas).text((0, 2), text, fill="black", font=font)
    canvas.paste(to_pil(image), (0, _LINE))
    return F.pil_to_tensor(canvas)


def _sheet(rows: list[tuple[str, list[Tensor]]]) -> Image.Image:
    """Return the sheet of rows of pictures of equal size, with a line of text above each row."""
    height, width = rows[0][1][0].shape[-2:]
    columns = len(rows[0][1])
    title = _LINE + 4
    step = title + height + _GAP
    canvas = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(rows) * step + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.truetype(FONT, FONT_SIZE + 3)
    for number, (text, pictures) in enumerate(rows):
        top = number * step
        draw.text((_GAP, top + 3), text, fill="black", font=font)
        for column, picture in enumerate(pictures):
            canvas.paste(to_pil(picture), (_GAP + column * (width + _GAP), top + title))
    return canvas
