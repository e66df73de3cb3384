"""The linear classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from allinone_ds.models.class_loss import ClassLoss, ClassLossOptions, set_prior


class LinearOptions(ClassLossOptions):
    """Options of the classification head `linear`.

    Example:
        >>> LinearOptions(label_smoothing=0.1).dropout
        0.0
    """

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a pooled feature in training."""
    prior: Literal["uniform", "data"] = "uniform"
    """Initial probability of the classes: "uniform": all equal; "data": their frequency in the training data."""


class LinearClassifier(nn.Linear):
    """Linear layer whose classes all start equally likely.

    Args:
        num_classes: K.
        channels: channels C of the pooled features.
        options: see `LinearOptions`.
    """

    def __init__(self, num_classes: int, channels: int, options: LinearOptions) -> None:
        super().__init__(channels, num_classes)
        self.prior = options.prior
        self.criterion = ClassLoss(num_classes, options)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, pooled: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the logits (B, K) of pooled features (B, C), twice: for predictions and for the loss."""
        logits = super().forward(pooled)
        return logits, logits.float()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over images.

        Args:
            logits: (B, K) float32, the second result of `forward`.
            labels: (B,) long.
        """
        return self.criterion(logits, labels, self.training) / max(len(labels), 1)

    def needs_frequencies(self) -> bool:
        """Return whether `use_frequencies` would change something."""
        return self.criterion.balanced or (self.prior == "data" and not self.bias.any())

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set prior and balanced class weights from the frequencies of the classes in the training data."""
        self.criterion.use_frequencies(frequencies)
        if self.prior == "data":
            set_prior(self.bias, frequencies, self.criterion.weights)
