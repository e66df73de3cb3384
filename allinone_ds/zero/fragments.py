"""Which elements of which parameter lie where in a rank's flat optimizer shards. Checked on DeepSpeed 0.19.8.

ZeRO stages 1 and 2 (and `BF16_Optimizer`) lay the parameters of a group one after the other and cut the result into
equal parts; stage 3 cuts every parameter. The end of a part may be padding, which is never set: it belongs to no
fragment, so it is never copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Shapes = Sequence[Mapping[str, torch.Size]]
"""Shapes of the parameters of each group by name, in the order of the group."""


@dataclass(frozen=True)
class Fragment:
    """Elements of a parameter in the flat tensor that a rank keeps for one group.

    Args:
        name: of the parameter.
        offset: first of the elements in the flattened parameter.
        group: index of the flat tensor.
        start: first of the elements in the flat tensor.
        length: number of elements.
    """

    name: str
    offset: int
    group: int
    start: int
    length: int


def fragments_of_parts(
    shapes: Shapes, paddings: Sequence[Sequence[int]], parts: Sequence[tuple[int, int]]
) -> list[Fragment]:
    """Return what lies in one rank's part of every group, for ZeRO stages 1 and 2.

    Args:
        shapes: of the parameters of each group.
        paddings: elements after each parameter, per group.
        parts: (first element, number of elements) of the rank's part, per group.
    """
    fragments = []
    for group, (named, gaps, (first, size)) in enumerate(zip(shapes, paddings, parts, strict=True)):
        position = 0
        for (name, shape), gap in zip(named.items(), gaps, strict=True):
            begin, end = max(position, first), min(position + shape.numel(), first + size)
            if begin < end:
                fragments.append(Fragment(name, begin - position, group, begin - first, end - begin))
            position += shape.numel() + gap
    return fragments


def fragments_of_parameters(shapes: Shapes, rank: int, world: int) -> list[Fragment]:
    """Return what one rank keeps of every parameter, for ZeRO stage 3.

    Args:
        shapes: of the parameters of each group.
        rank: 0..R-1.
        world: number of ranks R.
    """
    fragments = []
    for group, named in enumerate(shapes):
        start = 0
        for name, shape in named.items():
            part = -(-shape.numel() // world)
            length = min(part, shape.numel() - rank * part)
            if length > 0:
                fragments.append(Fragment(name, rank * part, group, start, length))
            start += part
    return fragments


def no_paddings(shapes: Shapes) -> list[list[int]]:
    """Return paddings of zero elements, for groups whose parameters follow each other without a gap."""
    return [[0] * len(named) for named in shapes]
