"""Drawings of label maps: every class has its colour, and the background keeps the picture's."""

from __future__ import annotations

import pytest
import torch

from allinone_ds.tasks import build_task
from allinone_ds.tasks.drawing import draw_mask, in_rows, palette
from tests.tiny import SIZE, samples, tiny_backbone

NAMES = ["road", "sky", "car"]


def picture() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor([0, 1, 2, 255]).repeat(8, 2).byte()  # (8, 8)
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), mask


@pytest.mark.parametrize(
    "name", ["background", "Background", "__background__", "bg", "_background_", "unlabeled", "void"]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_background_is_left_alone_wherever_it_stands(name: str, place: int) -> None:
    image, mask = picture()
    classes = [name if k == place else other for k, other in enumerate(NAMES)]
    drawn, present = draw_mask(image, mask, classes)
    same = (drawn == image).all(0)
    assert torch.equal(same, (mask == place) | (mask == 255))
    assert present == [k for k in range(3) if k != place]
    full, _ = draw_mask(image, mask, NAMES)  # the colours of the other classes do not change
    others = (mask != place) & (mask != 255)
    assert torch.equal(drawn[:, others], full[:, others])


@pytest.mark.parametrize("name", ["wall", "ground", "back", "background car"])
def test_other_classes_are_drawn_in_their_colour(name: str) -> None:
    image, mask = picture()
    drawn, present = draw_mask(image, mask, [name, *NAMES[1:]], alpha=1.0)
    assert present == [0, 1, 2]
    assert (drawn[:, mask == 0] == torch.tensor(palette(3)[0], dtype=torch.uint8)[:, None]).all()


def test_predictions_truths_and_legends_leave_it_alone() -> None:
    sample = samples(1)[0]
    backbone = tiny_backbone()
    empty = torch.zeros(SIZE, dtype=torch.uint8)
    sample["mask"] = sample["mask"] * 0
    for name, alone in (("background", True), ("road", False)):
        task = build_task("segmentation", "seg", [name, "b", "c"], backbone, SIZE)
        image = sample["image"].as_subclass(torch.Tensor)
        drawn = task.draw(image, {"mask": empty})
        factor = drawn.shape[-1] // SIZE[1]
        large = image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        assert torch.equal(drawn[:, : large.shape[1]], large) == alone
        assert (drawn.shape[1] == large.shape[1]) == alone  # a legend only where a class is drawn
        truth, text = task.draw_truth(sample, task.classes)
        assert torch.equal(truth, image) == alone and text == ("" if alone else "road")


def test_drawings_go_on_in_a_new_row() -> None:
    drawn = in_rows([torch.zeros(3, 10, 40, dtype=torch.uint8)] * 5, widest=90)
    assert tuple(drawn.shape) == (3, 3 * 16, 86) and bool((drawn[:, -16:, 40:] == 255).all())
