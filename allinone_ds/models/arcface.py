"""ArcFace classifier: compares angles, and requires the true class to win by a margin in training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from allinone_ds.device_constants import constant
from allinone_ds.errors import ConfigError
from allinone_ds.models.class_loss import ClassLoss, ClassLossOptions

_LARGEST_COSINE = 1.0 - 1e-7  # the slope of acos is infinite at 1


class ArcFaceOptions(ClassLossOptions):
    """Options of the classification head `arcface`.

    Example:
        >>> ArcFaceOptions(width=64, sub_centers=3).margin
        0.5
    """

    width: int = Field(512, ge=1)
    """Channels of the embedding in which angles are computed."""
    margin: float = Field(0.5, ge=0, lt=math.pi / 2)
    """Angle in radians (0.5 is 28.6 degrees) added to the angle of the true class in training."""
    scale: float = Field(64.0, gt=0)
    """Factor that turns cosines into logits."""
    sub_centers: int = Field(1, ge=1)
    """Directions per class, of which the nearest counts; more than 1 tolerates noisy labels."""
    class_counts: list[int] | None = None
    """Training images of each class, in the order of the classes; rare classes then get larger margins."""
    smallest_margin: float = Field(0.05, ge=0, lt=math.pi / 2)
    """With `class_counts`: margin of the most frequent class in radians; the rarest class gets `margin`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a pooled feature in training."""


class ArcFace(nn.Module):
    """Embedding and one or more directions per class; the logits are scaled cosines between them.

    With a margin m the logit of the true class is scale * cos(angle + m). Beyond angle + m = pi, where the cosine
    would rise again, it is scale * (cos(angle) - m * sin(m)) (ArcFace, https://arxiv.org/abs/1801.07698, eq. 3). With
    sub-centers the cosine of a class is the largest over its directions
    (https://doi.org/10.1007/978-3-030-58621-8_43). Margins from class counts n decrease with n ** -1/4 from `margin`
    to `smallest_margin` (https://arxiv.org/abs/2010.05350, section 3.2). Angles are float32 whatever the dtype of the
    weights.

    Args:
        num_classes: K.
        channels: channels C of the pooled features.
        options: see `ArcFaceOptions`.

    Raises:
        ConfigError: the class counts do not match the classes.
    """

    def __init__(self, num_classes: int, channels: int, options: ArcFaceOptions) -> None:
        super().__init__()
        self.num_classes, self.scale = num_classes, options.scale
        self.margin_of_class = class_margins(num_classes, options)
        self.criterion = ClassLoss(num_classes, options)
        self.embed = nn.Linear(channels, options.width)
        self.weight = nn.Parameter(torch.empty(num_classes * options.sub_centers, options.width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, pooled: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) in float32 without margins, and with margins if labels are given.

        Args:
            pooled: (B, C), any floating dtype.
            labels: (B,) long.
        """
        embedded = self.embed(pooled)
        with torch.autocast(pooled.device.type, enabled=False):
            cosines = F.linear(F.normalize(embedded.float()), F.normalize(self.weight.float()))
            cosines = cosines.unflatten(1, (self.num_classes, -1)).amax(-1)  # (B, K)
            if labels is None:
                return self.scale * cosines, self.scale * cosines
            rows = torch.arange(len(labels), device=labels.device)
            margins = constant(self.margin_of_class, labels)[labels]  # (B,)
            true = cosines[rows, labels].clamp(-_LARGEST_COSINE, _LARGEST_COSINE)
            angles = true.acos()
            harder = torch.where(angles + margins <= math.pi, (angles + margins).cos(), true - margins * margins.sin())
            with_margins = cosines.index_put((rows, labels), harder)
            return self.scale * cosines, self.scale * with_margins

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over images.

        Args:
            logits: (B, K) float32, the second result of `forward`.
            labels: (B,) long.
        """
        return self.criterion(logits, labels, self.training) / max(len(labels), 1)

    def needs_frequencies(self) -> bool:
        """Return whether `use_frequencies` would change something."""
        return self.criterion.balanced

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set balanced class weights from the frequencies of the classes in the training data."""
        self.criterion.use_frequencies(frequencies)


def class_margins(num_classes: int, options: ArcFaceOptions) -> list[float]:
    """Return the margin of every class in radians.

    Raises:
        ConfigError: the class counts do not match the classes.
    """
    counts = options.class_counts
    if counts is None:
        return [options.margin] * num_classes
    if len(counts) != num_classes or min(counts) < 1:
        raise ConfigError(
            f"arcface: class_counts has {len(counts)} entries, the smallest {min(counts, default=0)}; the data has "
            f"{num_classes} classes; give one number of at least 1 per class"
        )
    if options.smallest_margin > options.margin:
        raise ConfigError(f"arcface: smallest_margin {options.smallest_margin} is above margin {options.margin}; "
                          "lower it or raise margin")  # fmt: skip
    rarity = [count**-0.25 for count in counts]
    lowest, span = min(rarity), max(rarity) - min(rarity)
    fractions = [(value - lowest) / span if span else 1.0 for value in rarity]
    return [options.smallest_margin + f * (options.margin - options.smallest_margin) for f in fractions]
