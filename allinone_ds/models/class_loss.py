"""The loss of heads that predict one class: cross-entropy with class weights, label smoothing and a focal factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from allinone_ds.device_constants import constant
from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict

_RARE = 1e-3
"""Frequency that is spread over all classes, so that none that was not seen has the frequency 0."""


ClassWeights = Literal["balanced"] | list[Annotated[float, Field(ge=0)]] | None
"""One weight per class, or "balanced": from the frequencies of the classes; None: all 1."""


class ClassLossOptions(Strict):
    """Options of `ClassLoss`, which the heads that use it share.

    Example:
        >>> ClassLossOptions(class_weights="balanced", focal_gamma=2.0).label_smoothing
        0.0
    """

    class_weights: ClassWeights = None
    """Weight of each class in the loss, in the order of the classes; "balanced": 1 / (K * frequency) of its training
    data; None: all 1."""
    focal_gamma: float = Field(default=0.0, ge=0)
    """Exponent of the factor (1 - p) ** gamma with which the loss of a target of probability p counts; 0: no factor."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the target that is spread over all classes in training."""


class ClassLoss:
    """Cross-entropy of K classes, summed over the targets.

    With `focal_gamma` it is the focal loss (https://arxiv.org/abs/1708.02002) of the softmax. A mean of it divides by
    the number of targets and not by the sum of their weights, so that a target counts equally in every micro-batch.

    Args:
        num_classes: K.
        options: see `ClassLossOptions`.

    Raises:
        ConfigError: there is not one weight per class, or all are 0.

    Attributes:
        weights: K weights; None: all are 1, or they wait for `use_frequencies`.

    Example:
        >>> loss = ClassLoss(3, ClassLossOptions(class_weights=[1.0, 1.0, 2.0]))
        >>> round(float(loss(torch.zeros(2, 3), torch.tensor([0, 2]), training=True)), 3)  # (1 + 2) * log(3)
        3.296
    """

    def __init__(self, num_classes: int, options: ClassLossOptions) -> None:
        self.options = options
        self.balanced = options.class_weights == "balanced"
        self.weights: list[float] | None = None
        if isinstance(options.class_weights, list):
            self.weights = list(options.class_weights)
            if len(self.weights) != num_classes or not any(self.weights):
                raise ConfigError(
                    f"class_weights has {len(self.weights)} entries with the sum {sum(self.weights)}; the data has "
                    f"{num_classes} classes; give one number per class, at least one of them above 0"
                )

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set the weights of `class_weights: balanced`; otherwise do nothing.

        Args:
            frequencies: fraction of the training targets of each class.
        """
        if self.balanced:
            self.weights = [1 / (len(frequencies) * frequency) for frequency in smoothed(frequencies)]

    def __call__(self, logits: Tensor, labels: Tensor, training: bool, ignore_index: int = -100) -> Tensor:
        """Return the sum of the losses of all targets.

        Args:
            logits: (B, K, ...) float32.
            labels: (B, ...) long.
            training: whether labels are smoothed.
            ignore_index: targets of this value do not count.
        """
        smoothing = self.options.label_smoothing if training else 0.0
        weights = None if self.weights is None else constant(self.weights, logits, logits.dtype)
        gamma = self.options.focal_gamma
        if not gamma:
            return F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="sum",
                                   label_smoothing=smoothing)  # fmt: skip
        each = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="none",
                               label_smoothing=smoothing)  # fmt: skip
        known = labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)  # ignored targets have the loss 0
        log_p = logits.log_softmax(1).gather(1, known).squeeze(1)
        return ((1 - log_p.exp()).clamp(min=1e-12) ** gamma * each).sum()


def smoothed(frequencies: Sequence[float]) -> list[float]:
    """Return frequencies of which none is 0, with the sum 1."""
    K = len(frequencies)
    return [(frequency + _RARE / K) / (sum(frequencies) + _RARE) for frequency in frequencies]


@torch.no_grad()
def set_prior(bias: Tensor | None, frequencies: Sequence[float], weights: Sequence[float] | None = None) -> bool:
    """Set a classifier's bias to the log frequencies of its classes, unless it was trained; return whether it was set.

    All classes then start with the probability that they have in the data, which no constant prediction can improve.
    Otherwise the first steps only teach the bias, with a large gradient, and a small head can collapse to the most
    frequent class meanwhile.

    Args:
        bias: (K,) of the last layer; a bias that is not 0 is a trained one.
        frequencies: fraction of the training targets of each class.
        weights: weight of each class in the loss; a target of weight w counts as w targets.
    """
    if bias is None or bool(bias.any()):
        return False
    weighted = smoothed(frequencies)
    if weights is not None:
        parts = [frequency * weight for frequency, weight in zip(weighted, weights, strict=True)]
        weighted = smoothed([part / sum(parts) for part in parts])
    bias.copy_(torch.tensor(weighted, dtype=torch.float64).log())
    return True
