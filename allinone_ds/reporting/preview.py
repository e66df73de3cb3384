"""Contact sheets of augmentation: a row a branch, a column a training sample, boxes and masks drawn."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from allinone_ds.data.augmentation.transforms import eval_transform, train_transform
from allinone_ds.data.base import Sample, SampleDataset
from allinone_ds.data.further_samples import FurtherSamples
from allinone_ds.data.random_state import own_random_state, seed_all
from allinone_ds.data.schedule import Draw, Schedule
from allinone_ds.data.sources import open_source
from allinone_ds.errors import BrokenSample, ConfigError, DataError
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.tasks.drawing import FONT, FONT_SIZE, draw_boxes, draw_mask, to_pil

_CELL = 320  # longer side of one picture, pixels
_GAP = 6
_LINE = FONT_SIZE + 8
_NAMED = 8  # boxes up to which their classes are written


def preview_run(config: RunConfig, output: Path, samples: int) -> list[Path]:
    """Draw what each branch of each task makes of the first samples of the run.

    The first row is the plain resize, the truth as the dataset has it. Pixels of a mask without class (255) are dark.

    Args:
        config: the run; only its training data is read.
        output: NAME.png becomes NAME-TASK.png for every task.
        samples: columns.

    Returns:
        The files written.

    Raises:
        ConfigError: `output` does not end as a picture's name does.
        DataError: the data cannot be trained on.
    """
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--output {output}: must be a picture's name that ends in .png or .jpg")
    output.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name, task in config.tasks.items():
        dataset = open_source(task.train, config.data_root)
        seed = config.trainer.get("data_seed")
        seed = config.trainer.get("seed", 42) if seed is None else seed  # 42 is Trainer's default
        drawn = _readable(dataset, Schedule(seed, {name: len(dataset)}, {name: (1, 1)}, 1), name, samples)
        plain = eval_transform(task.image_size)
        rows = [("plain resize", [draw_sample(plain(sample), dataset.classes) for _, sample in drawn])]
        transform = train_transform(task.augment, task.image_size, dataset.kind)
        with own_random_state():
            for branch, probability in transform.probabilities.items():
                alone, pictures = transform.only(branch), []
                for draw, sample in drawn:
                    seed_all(draw.seed)
                    more = FurtherSamples(dataset, [], config.max_broken_images)
                    pictures.append(draw_sample(alone(sample, more), dataset.classes))
                rows.append((f"{branch}: {probability:.0%} of the samples", pictures))
        file = output.with_name(f"{output.stem}-{name}{output.suffix}")
        _sheet(rows).save(file)
        written.append(file)
    return written


def _readable(dataset: SampleDataset, schedule: Schedule, task: str, count: int) -> list[tuple[Draw, Sample]]:
    """The first `count` samples that can be read, in the order the run takes them."""
    found: list[tuple[Draw, Sample]] = []
    for position in range(len(dataset)):
        draw = schedule.at(task, position)
        try:
            found.append((draw, dataset[draw.index]))
        except BrokenSample:
            continue
        if len(found) == count:
            break
    if not found:
        raise DataError(f"{dataset.name}: not one of {len(dataset)} samples can be read; repair them")
    return found


def draw_sample(sample: Sample, classes: list[str]) -> Tensor:
    """One transformed sample as a picture: uint8 (3, h, w), the longer side of one fixed length."""
    height, width = sample["image"].shape[-2:]
    factor = _CELL / max(height, width)
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    small = max(height, width) < _CELL  # pixels stay sharp squares
    kind = InterpolationMode.NEAREST if small else InterpolationMode.BILINEAR
    image = F.resize(sample["image"].as_subclass(Tensor), size, kind, antialias=not small)
    text = ""
    if "mask" in sample:
        mask = F.resize(sample["mask"].as_subclass(Tensor)[None], size, InterpolationMode.NEAREST)[0]
        image, present = draw_mask(image, mask, len(classes), alpha=0.35)
        image = torch.where(mask >= len(classes), image // 4, image)
        text = ", ".join(classes[k] for k in present)
    elif "boxes" in sample:
        boxes = sample["boxes"].as_subclass(Tensor) * torch.tensor([size[1] / width, size[0] / height] * 2)
        names = [classes[k] for k in sample["labels"].tolist()] if len(boxes) <= _NAMED else []
        image = draw_boxes(image, boxes, sample["labels"], names, len(classes))
        text = "1 box" if len(boxes) == 1 else f"{len(boxes)} boxes"
    elif "label" in sample:
        text = classes[sample["label"]]
    return _titled(image, text)


def _titled(image: Tensor, text: str) -> Tensor:
    """The image with a line of text above, cut to its width."""
    height, width = image.shape[-2:]
    canvas = Image.new("RGB", (width, height + _LINE), "white")
    font = ImageFont.truetype(FONT, FONT_SIZE)
    while text and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…" if len(text) > 2 else ""
    ImageDraw.Draw(canvas).text((0, 2), text, fill="black", font=font)
    canvas.paste(to_pil(image), (0, _LINE))
    return F.pil_to_tensor(canvas)


def _sheet(rows: list[tuple[str, list[Tensor]]]) -> Image.Image:
    """Rows of pictures of one size, a line of text above each row."""
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
