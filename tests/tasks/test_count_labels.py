"""The loss of every head is a sum over its micro-batch, divided by the labels that its task counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tasks.heads import HEADS, build
from tests.tiny import samples


def uneven(name: str) -> list[dict]:
    """Four samples with different numbers of labels, one without any of detection and segmentation."""
    made = samples(4)
    for number, sample in enumerate(made):
        sample["mask"][: 8 * number] = 255
        if name == "det":
            more = sample["boxes"].repeat(number, 1) + 5 * torch.arange(number)[:, None]
            sample["boxes"] = type(sample["boxes"])(more, format="XYXY", canvas_size=(32, 32))
            sample["labels"], sample["iscrowd"] = torch.arange(number) % 3, torch.zeros(number, dtype=torch.bool)
    made[3]["mask"][:] = 255
    return made


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_a_batch_is_that_of_its_images_weighted_by_their_labels(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.rand

    def same_for_all(*size: int, **options: object) -> Tensor:  # mask2former looks at random points
        return random(size[1:], generator=torch.Generator().manual_seed(0)).expand(size).clone()

    monkeypatch.setattr(torch, "rand", same_for_all)
    model, name, task = build(head)
    model.train()
    made = uneven(name)
    parts = [task.collate([sample]) for sample in made]
    counts = [task.count_labels(part["labels"]) for part in parts]
    if name == "cls":
        assert counts == [None] * 4
        counts = [1] * 4
    else:
        assert 0 in counts and len(set(counts)) > 2
    with torch.no_grad():
        whole = task.collate(made)
        if name != "cls":
            assert task.count_labels(whole["labels"]) == sum(counts)
        sums = [model(name, **part).loss * max(n, 1) for part, n in zip(parts, counts, strict=True)]
        found = model(name, **whole).loss
    torch.testing.assert_close(found, torch.stack(sums).sum() / max(sum(counts), 1), rtol=1e-4, atol=1e-5)
