"""ArcFace classifiers: classes by angle, with a margin that the true class must win by."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict

# acos has an infinite slope at 1
_LARGEST_COSINE = 1.0 - 1e-7


class ArcFaceOptions(Strict):
    """Options of classification's head `arcface`."""

    width: int = Field(512, ge=1)
    """Channels of the embedding that angles are measured in."""
    margin: float = Field(0.5, ge=0, lt=math.pi / 2)
    """Angle in radians (0.5 is 28.6 degrees) that is added to that of the true class in training."""
    scale: float = Field(64.0, gt=0)
    """Factor on cosines, which makes them logits."""
    sub_centers: int = Field(1, ge=1)
    """Directions that stand for a class, of which the nearest counts; more than 1 bears noisy labels."""
    class_counts: list[int] | None = None
    """Training images of each class, in the order of the classes; given, rare classes get larger margins."""
    smallest_margin: float = Field(0.05, ge=0, lt=math.pi / 2)
    """With `class_counts`: margin in radians of the most frequent class; the rarest gets `margin`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the pooled features dropped in training."""


class ArcFace(nn.Module):
    """Embedding, and one or more directions a class: logits are scaled cosines of the angles between them.

    With a margin m the logit of the true class is scale * cos(angle + m), or scale * (cos(angle) - m * sin(m)) beyond
    angle + m = pi, where the cosine would rise again (ArcFace, https://arxiv.org/abs/1801.07698, eq. 3). With
    sub-centers the cosine of a class is its largest one (https://doi.org/10.1007/978-3-030-58621-8_43). Margins by
    class counts n fall with n ** -1/4 from `margin` to `smallest_margin` (https://arxiv.org/abs/2010.05350, section
    3.2). Angles are float32 whatever the dtype of the weights.

    Args:
        num_classes: K.
        channels: channels of the pooled features.
        options: see `ArcFaceOptions`.

    Raises:
        ConfigError: class counts that do not fit the classes.
    """

    def __init__(self, num_classes: int, channels: int, options: ArcFaceOptions) -> None:
        super().__init__()
        self.num_classes, self.scale = num_classes, options.scale
        self.margin_of_class = class_margins(num_classes, options)
        self.embed = nn.Linear(channels, options.width)
        self.weight = nn.Parameter(torch.empty(num_classes * options.sub_centers, options.width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, pooled: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, K) float32, and the same with margins where `labels` (B,) are given.

        Args:
            pooled: (B, C), any floating dtype.
        """
        embedded = self.embed(pooled)
        with torch.autocast(pooled.device.type, enabled=False):
            cosines = F.linear(F.normalize(embedded.float()), F.normalize(self.weight.float()))
            cosines = cosines.unflatten(1, (self.num_classes, -1)).amax(-1)  # (B, K)
            if labels is None:
                return self.scale * cosines, self.scale * cosines
            rows = torch.arange(len(labels), device=labels.device)
            margins = torch.tensor(self.margin_of_class, device=labels.device)[labels]  # (B,)
            own = cosines[rows, labels].clamp(-_LARGEST_COSINE, _LARGEST_COSINE)
            angles = own.acos()
            harder = torch.where(angles + margins <= math.pi, (angles + margins).cos(), own - margins * margins.sin())
            hardened = cosines.index_put((rows, labels), harder)
            return self.scale * cosines, self.scale * hardened


def class_margins(num_classes: int, options: ArcFaceOptions) -> list[float]:
    """Margin of every class, in radians.

    Raises:
        ConfigError: class counts that do not fit the classes.
    """
    counts = options.class_counts
    if counts is None:
        return [options.margin] * num_classes
    if len(counts) != num_classes or min(counts) < 1:
        raise ConfigError(
            f"arcface: class_counts has {len(counts)} entries from {min(counts, default=0)} on, the data has "
            f"{num_classes} classes; give one number from 1 on for each class"
        )
    if options.smallest_margin > options.margin:
        raise ConfigError(f"arcface: smallest_margin {options.smallest_margin} is above margin {options.margin}")
    rarity = [count**-0.25 for count in counts]
    lowest, span = min(rarity), max(rarity) - min(rarity)
    share = [(value - lowest) / span if span else 1.0 for value in rarity]
    return [options.smallest_margin + s * (options.margin - options.smallest_margin) for s in share]
