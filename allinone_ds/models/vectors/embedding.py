"""Embeddings of images: trained by ArcFace, or by a loss on pairs from `pytorch-metric-learning`."""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from allinone_ds.device_constants import copied_to
from allinone_ds.errors import ConfigError
from allinone_ds.models.arcface import ArcFace, ArcFaceOptions
from allinone_ds.strict import Strict, did_you_mean

IGNORED = -100
"""Label of an image without an identity."""
_PAIRS = {
    "contrastive": "ContrastiveLoss",
    "triplet": "TripletMarginLoss",
    "multi_similarity": "MultiSimilarityLoss",
    "ntxent": "NTXentLoss",
    "supcon": "SupConLoss",
}
"""Losses on pairs: their names here, and those of their classes in pytorch_metric_learning.losses."""
_WATCHED = 20  # micro-batches after which a lack of pairs is reported


class EmbeddingOptions(Strict):
    """Options of the retrieval head `embedding`.

    Example:
        >>> EmbeddingOptions(loss="triplet", loss_options={"margin": 0.1}).width
        128
    """

    width: int = Field(128, ge=1)
    """Numbers of an embedding."""
    loss: Literal["arcface", "contrastive", "triplet", "multi_similarity", "ntxent", "supcon"] = "arcface"
    """"arcface" learns a direction for each identity of the training data; the others compare the images of a
    micro-batch, of which some must show one identity, and need the package pytorch-metric-learning."""
    loss_options: dict[str, float] = {}
    """Numbers for the loss: `margin` in radians and `scale` of arcface (0.3 and 16), otherwise those of its class."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a pooled feature in training."""


def build_embedding(num_identities: int, channels: int, options: EmbeddingOptions) -> nn.Module:
    """Return a module that maps pooled features (B, C) and labels (B,) or None to (embeddings (B, D), loss or None).

    Embeddings are float32 of length 1.

    Args:
        num_identities: identities of the training data.
        channels: C.
        options: see `EmbeddingOptions`.

    Raises:
        ConfigError: an option of the loss is unknown, or its package is missing.
    """
    if options.loss == "arcface":
        return _ArcFaceEmbedding(num_identities, channels, options)
    return _PairEmbedding(channels, options)


class _ArcFaceEmbedding(nn.Module):
    needs_pairs = False

    def __init__(self, num_identities: int, channels: int, options: EmbeddingOptions) -> None:
        super().__init__()
        _check_options(options, ["margin", "scale"])
        values: dict[str, Any] = {"margin": 0.3, "scale": 16.0, **options.loss_options}
        self.arcface = ArcFace(num_identities, channels, ArcFaceOptions(width=options.width, **values))

    def forward(self, pooled: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        embeddings = F.normalize(self.arcface.embed(pooled).float())
        if labels is None:
            return embeddings, None
        known = labels != IGNORED
        with torch.autocast(pooled.device.type, enabled=False):
            _, logits = self.arcface(pooled, labels.clamp(min=0) if self.training else None)
            return embeddings, F.cross_entropy(
                logits, labels, ignore_index=IGNORED, reduction="sum"
            ) / known.sum().clamp(min=1)


class _PairEmbedding(nn.Module):
    needs_pairs = True

    def __init__(self, channels: int, options: EmbeddingOptions) -> None:
        super().__init__()
        try:
            losses = importlib.import_module("pytorch_metric_learning.losses")
        except ImportError as error:
            raise ConfigError(
                f"options.loss = '{options.loss}' needs pytorch-metric-learning: pip install 'allinone_ds[retrieval]', "
                "or use 'arcface', which needs no further package"
            ) from error
        cls = getattr(losses, _PAIRS[options.loss])
        named = {name for kind in cls.__mro__[:2] for name, p in inspect.signature(kind.__init__).parameters.items()
                 if isinstance(p.default, int | float)}  # fmt: skip
        _check_options(options, sorted(named))
        self.embed = nn.Linear(channels, options.width)
        self.criterion = cls(**options.loss_options)
        self.batches = self.without = 0

    def forward(self, pooled: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        embeddings = F.normalize(self.embed(pooled).float())
        if labels is None:
            return embeddings, None
        on_host = labels.tolist()  # the one wait for the device that is not the criterion's
        rows = [row for row, label in enumerate(on_host) if label != IGNORED]
        known = copied_to(torch.tensor(rows, dtype=torch.long), labels.device)
        with torch.autocast(pooled.device.type, enabled=False):
            loss = self.criterion(embeddings[known], labels[known]) if rows else 0.0
        if self.training:
            self._watch([on_host[row] for row in rows])
        return embeddings, loss + (embeddings * 0.0).sum()

    def _watch(self, labels: list[int]) -> None:
        """Warn once if most micro-batches have no pair of one identity, or none of two, so that nothing is learned."""
        self.batches += 1
        self.without += not 1 < len(set(labels)) < len(labels)
        if self.batches == _WATCHED and 2 * self.without > self.batches:
            warnings.warn(
                f"retrieval: {self.without} of {self.batches} micro-batches had no two images of one identity, or "
                "only one identity: a loss on pairs learns nothing from them; raise batch_size, or use loss: arcface",
                stacklevel=2,
            )


def _check_options(options: EmbeddingOptions, allowed: list[str]) -> None:
    for name in options.loss_options:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise ConfigError(f"options.loss_options: '{name}' is no number of the loss '{options.loss}'; {hint}")
