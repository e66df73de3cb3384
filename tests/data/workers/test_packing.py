"""Packed tensors keep value, dtype, shape and class, whatever holds them."""

from dataclasses import dataclass, field

import pytest
import torch
from torchvision import tv_tensors

from allinone_ds.data.loading.loader import EvalBatch, StepBatch
from allinone_ds.data.loading.workers.packing import Packed, pack, unpack

BOXES = tv_tensors.BoundingBoxes(torch.rand(3, 4), format="XYXY", canvas_size=(24, 32))


@dataclass
class Own:
    """A dataclass of a custom collate, with a field that its constructor does not accept."""

    pixels: torch.Tensor
    count: int = field(init=False, default=3)


def equal(left, right) -> bool:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert getattr(left, "canvas_size", None) == getattr(right, "canvas_size", None)
        return torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, EvalBatch | Own):
        return equal(vars(left), vars(right))
    return left == right


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        "text",
        torch.tensor(2.5),
        torch.rand(0, 4),
        torch.rand(4, 6).T,  # not contiguous
        torch.rand(3, 4).expand(2, 3, 4),
        [
            torch.tensor([True]),
            torch.arange(5),
            torch.rand(3).double(),
            torch.rand(7).bfloat16(),
            torch.zeros(3, dtype=torch.uint16),
        ],
        {"boxes": BOXES, "none": BOXES[:0], "image": tv_tensors.Image(torch.zeros(3, 5, 7, dtype=torch.uint8))},
        {"mask": tv_tensors.Mask(torch.ones(5, 7, dtype=torch.uint8)), 3: (1, torch.ones(1))},
        StepBatch(4, {"det": [{"labels": [{"boxes": torch.rand(2, 4)}]}]}, ["a: b"]),
        EvalBatch([{"image": torch.rand(3), "path": "x"}], {"pixel_values": torch.rand(2)}, 1),
        Own(torch.rand(2, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_unpacked_equals_what_was_packed(value):
    packed = pack(value)
    assert isinstance(packed, Packed) and packed.bytes.dtype == torch.uint8
    assert equal(unpack(packed), value)


def test_tensors_that_cannot_be_moved_stay_where_they_are():
    sparse = torch.sparse_coo_tensor([[0]], [1.0], (2,), check_invariants=True)
    assert unpack(pack([sparse]))[0] is sparse
