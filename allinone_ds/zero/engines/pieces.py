"""A rank's shard as flat vectors, and the pieces of them that norms and factors work on.

An engine keeps its shard in one flat vector per optimizer group (ZeRO-3: per sub-group). A `Piece` is a run of such a
vector that belongs wholly to the shared backbone or wholly not, so partitions that straddle parameters, groups or ranks
need no special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Span:
    """The elements of a parameter that this rank owns.

    Args:
        param: the parameter.
        group: index of the flat vector that holds the elements.
        start: first of the elements in the flat vector.
        length: number of elements.
    """

    param: Parameter
    group: int
    start: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A run of one flat vector of this rank that is wholly shared backbone (`shared`) or wholly not."""

    group: int
    start: int
    length: int
    shared: bool


def merge_spans(spans: Sequence[Span], sizes: Sequence[int], shared: AbstractSet[int]) -> list[Piece]:
    """Return the fewest pieces that cover each group's shard; padding (always zero) joins the piece before it."""
    pieces: list[Piece] = []
    for group, size in enumerate(sizes):
        runs: list[list[int]] = []  # [start, shared]
        for span in sorted((s for s in spans if s.group == group and s.length), key=lambda s: s.start):
            kind = int(id(span.param) in shared)
            if not runs:
                runs.append([0, kind])
            elif runs[-1][1] != kind:
                runs.append([span.start, kind])
        runs = runs or [[0, 0]]  # the last ranks may have nothing but padding of a small group
        ends = [start for start, _ in runs[1:]] + [size]
        pieces += [Piece(group, start, end - start, bool(kind)) for (start, kind), end in zip(runs, ends, strict=True)]
    return pieces


def cut(flats: Sequence[Tensor], pieces: Sequence[Piece]) -> list[Tensor]:
    """Return views of `flats`, one flat tensor per group, as `pieces`."""
    return [flats[piece.group].narrow(0, piece.start, piece.length) for piece in pieces]


RUN = 1 << 24
"""Most elements of parameters that `merge_neighbours` puts together."""


def merge_neighbours(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Return (start, length) of the spans of one group, ascending, with small neighbours merged."""
    found: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda span: span.start):
        start, length = found[-1] if found else (0, 0)
        if start + length == span.start and length + span.length <= RUN:
            found[-1:] = [(start, length + span.length)]
        else:
            found.append((span.start, span.length))
    return found
