"""The linear classifier, with label smoothing."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from allinone_ds.strict import Strict


class LinearOptions(Strict):
    """Options of the classification head `linear`.

    Example:
        >>> LinearOptions(label_smoothing=0.1).dropout
        0.0
    """

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a pooled feature in training."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Fraction of the target that is spread over all classes in training."""


class LinearClassifier(nn.Linear):
    """Linear layer whose classes all start equally likely.

    Args:
        num_classes: K.
        channels: channels C of the pooled features.
        options: see `LinearOptions`.
    """

    def __init__(self, num_classes: int, channels: int, options: LinearOptions) -> None:
        super().__init__(channels, num_classes)
        self.label_smoothing = options.label_smoothing
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, pooled: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the logits (B, K) of pooled features (B, C), twice: for predictions and for the loss."""
        logits = super().forward(pooled)
        return logits, logits.float()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over images, smoothed in training.

        Args:
            logits: (B, K) float32, the second result of `forward`.
            labels: (B,) long.
        """
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if self.training else 0.0)
