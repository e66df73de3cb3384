"""Parts of the tasks' drawings: enlargement, colours, boxes, masks, captions, legends."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
FONT_SIZE = 13
_SMALLEST = 320  # minimum length of the shorter side of a drawing in pixels, so that text on it is readable
_WIDEST = 2000  # pixels of a row of drawings
_BACKGROUND = ("background", "bg", "unlabeled", "unlabelled", "void")
_LINE = FONT_SIZE + 6  # height of a line of text in pixels


def palette(count: int) -> list[tuple[int, int, int]]:
    """Return `count` RGB colours, the same in every run; neighbours differ strongly in hue."""
    golden = 0.61803398875
    colors = []
    for i in range(count):
        red, green, blue = colorsys.hsv_to_rgb((0.02 + i * golden) % 1.0, (0.85, 0.6, 0.95)[i % 3], (1.0, 0.85)[i % 2])
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def enlarge(image: Tensor) -> tuple[Tensor, int]:
    """Return the image (3, H, W) enlarged by an integer factor so that text on it is readable, and the factor.

    Pixels are repeated, not interpolated, so that the drawing shows exactly what the network was given.
    """
    image = image.as_subclass(Tensor)
    factor = max(1, -(-_SMALLEST // min(image.shape[-2:])))
    return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1), factor


def enlarge_mask(mask: Tensor, factor: int) -> Tensor:
    """Return the label map (H, W) enlarged by the factor that `enlarge` returned."""
    return mask.as_subclass(Tensor).repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def draw_boxes(image: Tensor, boxes: Tensor, labels: Tensor, names: list[str], num_classes: int) -> Tensor:
    """Return the image with boxes coloured by their labels; the first box is drawn on top.

    Args:
        image: uint8 (3, H, W).
        boxes: (n, 4) XYXY in pixels of the image.
        labels: (n,) in 0..num_classes-1.
        names: text at each box; an empty list for no text.
        num_classes: K.
    """
    if len(boxes) == 0:
        return image
    colors = palette(num_classes)
    return draw_bounding_boxes(
        image,
        boxes.as_subclass(Tensor).detach().cpu().flip(0),
        labels=names[::-1] or None,
        colors=[colors[k] for k in labels.flip(0).tolist()],
        width=2,
        font=FONT,
        font_size=FONT_SIZE,
        label_colors="black" if names else None,
        fill_labels=bool(names),
    )


def is_background(name: str) -> bool:
    """Return whether a class of a segmentation is what is left of the image, by its name.

    Example:
        >>> is_background("Background"), is_background("__background__"), is_background("wall")
        (True, True, False)
    """
    return name.strip(" _").lower() in _BACKGROUND


def draw_mask(image: Tensor, mask: Tensor, classes: Sequence[str], alpha: float = 0.55) -> tuple[Tensor, list[int]]:
    """Return the image blended with the colours of its label map, and the class ids that were drawn.

    A class that is named as the background keeps the colours of the image.

    Args:
        image: uint8 (3, H, W).
        mask: (H, W) class ids; ids from K on are not drawn.
        classes: K class names.
        alpha: weight of the colours, 0..1.
    """
    mask = mask.as_subclass(Tensor).cpu()
    present = [k for k in mask.unique().tolist() if k < len(classes) and not is_background(classes[k])]
    if present:
        colors = [palette(len(classes))[k] for k in present]
        image = draw_segmentation_masks(image, torch.stack([mask == k for k in present]), alpha, colors)
    return image, present


def caption(image: Tensor, lines: list[str]) -> Tensor:
    """Return the image with lines of text in a strip above it."""
    return _with_strip(image, [(line, None) for line in lines], above=True)


def legend(image: Tensor, entries: list[tuple[str, tuple[int, int, int]]]) -> Tensor:
    """Return the image with coloured squares and their names in a strip below it, as many per row as fit."""
    return _with_strip(image, [(name, color) for name, color in entries], above=False)


def beside(*drawings: Tensor) -> Tensor:
    """Return drawings next to each other; those of smaller height are padded with white."""
    height = max(drawing.shape[-2] for drawing in drawings)
    padded = [F.pad(x, (0, 6, 0, height - x.shape[-2]), value=255) for x in drawings]  # with a gap of 6 pixels
    return torch.cat(padded, dim=-1)[..., :-6]


def sheet(image: Tensor, drawings: Mapping[str, Tensor]) -> Tensor:
    """Return an image and the drawings of several tasks on it, in rows, each under its name.

    Args:
        image: uint8 (3, H, W).
        drawings: task -> uint8 (3, H', W').
    """
    panels = [caption(enlarge(image.cpu())[0], ["image"]), *(caption(d, [task]) for task, d in drawings.items())]
    return in_rows(panels, _WIDEST)


def in_rows(panels: Sequence[Tensor], widest: int) -> Tensor:
    """Return drawings in rows that are at most `widest` pixels wide."""
    rows: list[list[Tensor]] = [[]]
    for panel in panels:
        if rows[-1] and sum(p.shape[-1] for p in rows[-1]) + panel.shape[-1] > widest:
            rows.append([])
        rows[-1].append(panel)
    drawn = [beside(*row) for row in rows]
    width = max(row.shape[-1] for row in drawn)
    return torch.cat([F.pad(row, (0, width - row.shape[-1], 0, 6), value=255) for row in drawn], dim=-2)


def _with_strip(image: Tensor, entries: list[tuple[str, tuple[int, int, int] | None]], above: bool) -> Tensor:
    """Return the image with a strip of entries (text, colour of its square or None); texts without square get a row."""
    width = image.shape[-1]
    font = ImageFont.truetype(FONT, FONT_SIZE)
    positions: list[tuple[int, int, int]] = []  # left, top, width of the square
    x, row = 4, 0
    for text, color in entries:
        square = 0 if color is None else FONT_SIZE + 4
        entry_width = square + int(font.getlength(text)) + 10
        if positions and (color is None or x + entry_width > width):
            x, row = 4, row + 1
        positions.append((x, row * _LINE + 2, square))
        x += entry_width
    strip = Image.new("RGB", (width, (row + 1) * _LINE + 2 if entries else 0), "white")
    draw = ImageDraw.Draw(strip)
    for (text, color), (left, top, square) in zip(entries, positions, strict=True):
        if color is not None:
            draw.rectangle([left, top + 2, left + FONT_SIZE - 2, top + FONT_SIZE], fill=color)
        draw.text((left + square, top), text, fill="black", font=font)
    drawn = pil_to_tensor(strip)
    return torch.cat([drawn, image] if above else [image, drawn], dim=-2)


def to_pil(image: Tensor) -> Image.Image:
    """Return a drawing, uint8 (3, H, W), as a PIL image."""
    return to_pil_image(image)
