"""Retrieval: an embedding in which images of one identity are close; head `embedding`; recall at k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.distributed import gather_objects
from allinone_ds.models.vectors.embedding import IGNORED, EmbeddingOptions, build_embedding
from allinone_ds.tasks.base import Prediction, Task
from allinone_ds.tasks.details import Details
from allinone_ds.tasks.drawing import caption, enlarge
from allinone_ds.tasks.test_time import TestTime, View, refuse_windows
from allinone_ds.tasks.vectors.pooling import Pooling

_COUNTED = 20_000
"""Training images whose identities are counted at the start, for losses on pairs."""
RANKS = (1, 5, 10)
"""Numbers k of nearest images of recall at k."""
_CHUNK = 1024  # images whose distances to all others are computed at once
_STRIP = 28  # height of an embedding in a drawing in pixels


@dataclass
class RetrievalOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean loss over the images or pairs of the micro-batch, float32.
        embeddings: (B, D) float32 of length 1.
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None


class RetrievalTask(Task):
    """Maps an image to an embedding; images of one identity are closer to each other than to others.

    `classes` are the identities of the training data. A test set may have others: its images are searched among
    each other.

    Labels: (B,) long; -100 stands for no identity. Loss: mean over the images of the micro-batch (over its pairs for
    losses on pairs).

    Example:
        >>> import torch
        >>> sizes = {"channels": 8, "stride": 4, "num_levels": 1, "image_size": (16, 16)}
        >>> task = RetrievalTask("face", ["ann", "bob"], **sizes, width=6)
        >>> outputs = task((torch.randn(2, 8, 4, 4),), torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]))
        >>> outputs.loss.shape, task.predict(outputs, sizes=[(20, 30), (20, 30)])[0]["embedding"].shape
        (torch.Size([]), torch.Size([6]))
    """

    kind = "retrieval"
    main_metric = "recall1"
    greater_is_better = {f"recall{k}": True for k in RANKS}
    pipeline_tag = "image-feature-extraction"
    HEADS = {"embedding": EmbeddingOptions}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        self.pooling = Pooling(self.channels, self.num_levels, self.options.dropout)
        self.embedding = build_embedding(len(self.classes), self.pooling.width, self.options)

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        embeddings, loss = self.embedding(self.pooling(features), labels)
        return RetrievalOutput(loss=loss, embeddings=embeddings)

    def samples_to_count(self) -> int:
        return _COUNTED if self.embedding.needs_pairs else 0

    def use_samples(self, samples: Iterable[Sample]) -> str | None:
        """Return how large a micro-batch must be to have two images of one identity."""
        counts = Counter(int(sample["label"]) for sample in samples)
        images = sum(counts.values())
        pairs = sum(n * (n - 1) for n in counts.values()) / max(images * (images - 1), 1)
        if not pairs:
            return f"no two of {images} training images show one identity, so a loss on pairs learns nothing"
        needed = 0.5 + (0.25 + 2 / pairs) ** 0.5
        return (
            f"{len(counts)} identities in {images} training images; a micro-batch of {needed:.0f} images has one pair "
            "of one identity on average, from which a loss on pairs learns"
        )

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = torch.tensor([int(sample["label"]) for sample in samples])
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    def count_labels(self, labels: Any) -> int:
        """Return the number of images with an identity."""
        return int((labels != IGNORED).sum())

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return the image of a sample without an identity."""
        return {**sample, "label": IGNORED}

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image the "embedding" (D,) of length 1."""
        return [{"embedding": embedding} for embedding in outputs.embeddings.float()]

    def check_test_time(self, options: TestTime) -> None:
        refuse_windows(self.name, self.kind, options)

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the mean embeddings of the views, at length 1."""
        mean = torch.stack([view.outputs[0].embeddings.float() for view in views]).mean(0)
        return [{"embedding": embedding} for embedding in F.normalize(mean)[: len(sizes)]]

    def metric(self) -> RetrievalMetric:
        return RetrievalMetric()

    def details(self, metric: Any) -> Details:
        return metric.details() if isinstance(metric, RetrievalMetric) else {}

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        """Return the image above its embedding: red for positive numbers, blue for negative ones."""
        large, _ = enlarge(image.cpu())
        values = prediction["embedding"].float().cpu()
        strength = values / values.abs().max().clamp(min=1e-9)
        colors = torch.stack([1 + strength.clamp(max=0), 1 - strength.abs(), 1 - strength.clamp(min=0)])  # (3, D)
        strip = F.interpolate((255 * colors)[None, :, None], (_STRIP, large.shape[-1]), mode="nearest")[0]
        drawn = torch.cat([large, strip.round().to(torch.uint8)], dim=1)
        lines = [f"embedding of {len(values)} numbers"]
        if sample is not None:
            label = int(sample["label"])
            lines.append(
                f"identity: {self.classes[label] if label < len(self.classes) else f'{label}, not in training'}"
            )
        return caption(drawn, lines)

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the embedding."""
        return {"embedding": [round(value, 5) for value in prediction["embedding"].tolist()]}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image as it is and its identity."""
        return sample["image"].as_subclass(Tensor), classes[int(sample["label"])]

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "embedding" (B, D) of length 1."""
        return {"embedding": outputs.embeddings}

    def example_labels(self, batch_size: int) -> Tensor | None:
        return None if self.embedding.needs_pairs else torch.zeros(batch_size, dtype=torch.long)


class RetrievalMetric:
    """Recall at k ("recall1", "recall5", "recall10"; 0..1) among the images of all ranks.

    Every image is searched among all others by the cosine of their embeddings. Recall at k is the fraction of the
    images of which one of the k nearest shows the same identity. Images whose identity no other image shows are not
    counted, but may be found. The numbers of images may differ between ranks.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: list[tuple[np.ndarray, int]] = []

    def to(self, device: Any) -> RetrievalMetric:
        """Return itself: embeddings are kept on the CPU whatever the device."""
        return self

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            if int(sample["label"]) != IGNORED:
                self.rows.append((prediction["embedding"].float().cpu().numpy(), int(sample["label"])))

    def compute(self) -> dict[str, float]:
        """Return the metrics, the same on every rank; every rank must call it."""
        gathered = [row for of_rank in gather_objects(self.rows) for row in of_rank]
        labels = torch.tensor([label for _, label in gathered])
        self.images, self.queries = len(gathered), 0
        hits = dict.fromkeys(RANKS, 0)
        if gathered:
            embeddings = F.normalize(torch.from_numpy(np.stack([embedding for embedding, _ in gathered])))
            others = torch.unique(labels, return_inverse=True, return_counts=True)
            searched = (others[2][others[1]] > 1).nonzero()[:, 0]
            self.queries = len(searched)
            for chunk in searched.split(_CHUNK):
                closeness = embeddings[chunk] @ embeddings.T  # (chunk, n)
                closeness[torch.arange(len(chunk)), chunk] = -torch.inf
                nearest = closeness.topk(min(max(RANKS), len(labels) - 1), dim=1).indices
                right = labels[nearest] == labels[chunk, None]
                for k in RANKS:
                    hits[k] += int(right[:, :k].any(1).sum())
        return {f"recall{k}": count / self.queries if self.queries else 0.0 for k, count in hits.items()}

    def details(self) -> Details:
        """Return a warning if images could not be searched."""
        left = self.images - self.queries
        if not left:
            return {}
        return {"notes": [f"{left} of {self.images} images are the only ones of their identity and were not searched"]}
