"""The pieces of a rank's shard cover it, whichever parameters the rank holds."""

from __future__ import annotations

import torch

from allinone_ds.zero.engines.base import Span, merge_spans


def test_pieces_cover_every_group_including_one_of_padding_only() -> None:
    backbone, head = (torch.nn.Parameter(torch.zeros(6)) for _ in range(2))
    spans = [Span(backbone, 0, 0, 6), Span(head, 0, 6, 3), Span(head, 2, 0, 3)]
    pieces = merge_spans(spans, [10, 4, 3], {id(backbone)})
    assert [(p.group, p.start, p.length, p.shared) for p in pieces] == [
        (0, 0, 6, True), (0, 6, 4, False), (1, 0, 4, False), (2, 0, 3, False),
    ]  # fmt: skip
