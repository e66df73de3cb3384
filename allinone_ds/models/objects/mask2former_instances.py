"""Mask2Former in instance mode: one query per object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from allinone_ds.models.mask2former import Mask2FormerOutput, Mask2FormerSegmenter


class Mask2FormerInstances(Mask2FormerSegmenter):
    """Mask2Former (https://arxiv.org/abs/2112.01527) for instance segmentation, on a simple feature pyramid.

    It differs from the segmenter in its targets, one mask per object, and in its predictions.
    """

    max_detections = 100
    """Objects predicted per image, as in the paper."""

    def forward(self, features: tuple[Tensor, ...], labels: Any, ignore_index: int = 255) -> Mask2FormerOutput:
        """Return the raw predictions, and the loss if labels are given.

        Args:
            features: the backbone's maps.
            labels: for each image {"labels": (n,), "masks": (n, H, W)}.
            ignore_index: is not used.
        """
        class_logits, mask_logits = self.net(self.pyramid(self.fuse(features)))
        out = Mask2FormerOutput(class_queries_logits=class_logits[-1], masks_queries_logits=mask_logits[-1])
        if labels is not None:
            with torch.autocast(mask_logits[-1].device.type, enabled=False):
                layers = [
                    {"class_queries_logits": c, "masks_queries_logits": m}
                    for c, m in zip(class_logits, mask_logits, strict=True)
                ]
                zero = torch.stack([(value * 0.0).sum() for value in (*class_logits, *mask_logits)]).sum()
                masks = [target["masks"].float() for target in labels]
                out.loss = zero + self.matched_loss(layers, masks, [target["labels"] for target in labels])
        return out

    @staticmethod
    def count_labels(labels: Any) -> int:  # type: ignore[override]
        """Return what the loss is the mean of: objects, and images without any."""
        return sum(max(len(target["labels"]), 1) for target in labels)

    def found(self, outputs: Any, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Return for each image scores (n,), labels (n,) and mask logits (n, H, W), best first.

        The score is the class probability times the mean probability of the mask's pixels.

        Args:
            outputs: what `forward` returned.
            size: (H, W) of the masks.
        """
        images = []
        for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            scores = classes.float().softmax(-1)[:, :-1]  # (Q, K)
            best, places = scores.flatten().topk(min(self.max_detections, scores.numel()))
            queries, labels = places // scores.shape[1], places % scores.shape[1]
            logits = masks[queries].float()
            inside = logits > 0
            quality = (logits.sigmoid() * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
            total = best * quality
            order = total.argsort(descending=True)
            resized = F.interpolate(logits[order][None], size, mode="bilinear", align_corners=False)[0]
            images.append({"scores": total[order], "labels": labels[order], "masks": resized})
        return images
