"""Mask2Former in instance mode: one query per object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

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

    def postprocess(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return for each image "boxes" (n, 4), "scores" (n,), "labels" (n,) and "masks" bool (n, H, W), best first.

        The score is the class probability times the mean probability of the mask's pixels. Empty masks are left out.

        Args:
            outputs: what `forward` returned.
            sizes: (H, W) of each image in pixels.
        """
        images = []
        pairs = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        for (classes, masks), size in zip(pairs, sizes, strict=False):
            scores = classes.float().softmax(-1)[:, :-1]  # (Q, K)
            best, places = scores.flatten().topk(min(self.max_detections, scores.numel()))
            logits = masks[places // scores.shape[1]].float()
            inside = logits > 0
            best = best * (logits.sigmoid() * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
            order = best.argsort(descending=True)
            found = F.interpolate(logits[order][None], size, mode="bilinear", align_corners=False)[0] > 0
            some = found.flatten(1).any(1)
            boxes = masks_to_boxes(found[some])
            boxes[:, 2:] += 1  # the last pixel belongs to the box
            labels = (places % scores.shape[1])[order]
            images.append({"boxes": boxes, "scores": best[order][some], "labels": labels[some], "masks": found[some]})
        return images
