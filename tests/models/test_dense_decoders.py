"""Decoders of numbers per pixel: DPT's is that of transformers, and the light one is that of segmentation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead

from allinone_ds.models.dense.decoders import DptDecoder, DptDecoderOptions, LightDecoder, LightDecoderOptions
from allinone_ds.models.segmenters import LightOptions, LightSegmenter

SMALL = DptDecoderOptions(width=16, neck_widths=[8, 8, 16, 16])


def features(levels: int, size: tuple[int, int] = (5, 7)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 12, *size, generator=generator) for _ in range(levels))


def test_dpt_equals_the_head_of_transformers() -> None:
    torch.manual_seed(0)
    decoder = DptDecoder(1, 12, 4, SMALL)
    nn.init.normal_(decoder.output.weight)
    head = DPTDepthEstimationHead(decoder.neck.config)
    head.head.load_state_dict({key: value for key, value in decoder.head.state_dict().items()})
    maps = features(4)
    tokens = [F.pad(each.flatten(2).transpose(1, 2), (0, 0, 1, 0), value=9.0) for each in maps]  # a class token of 9
    expected = head(decoder.neck(tokens, 5, 7))
    torch.testing.assert_close(decoder(maps)[:, 0].relu(), expected)
    assert (decoder(maps) < 0).any()  # which the last ReLU of transformers would hide, with its gradient


@pytest.mark.parametrize(
    ("levels", "read"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3]), (6, [0, 2, 3, 5])]
)
def test_dpt_reads_first_maps_finely_and_last_ones_coarsely(levels: int, read: list[int]) -> None:
    decoder = DptDecoder(3, 12, levels, SMALL)
    assert decoder.levels == read
    assert decoder(features(levels, (4, 6))).shape == (2, 3, 16 * 4, 16 * 6)
    assert decoder(features(levels)).shape == (2, 3, 16 * 6, 16 * 8)


def test_every_weight_of_dpt_gets_a_gradient() -> None:
    decoder = DptDecoder(1, 12, 4, SMALL)
    decoder(features(4)).square().sum().backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


def test_the_light_decoder_is_that_of_segmentation() -> None:
    options = {"width": 32, "num_convs": 2, "upsamples": 2}
    decoder = LightDecoder(3, 12, 2, LightDecoderOptions(**options))
    segmenter = LightSegmenter(3, 12, 2, LightOptions(**options))  # type: ignore[call-arg]
    for own, other in (("fuse", "fuse"), ("layers", "decoder"), ("last", "classifier")):
        getattr(segmenter, other).load_state_dict(copy.deepcopy(getattr(decoder, own).state_dict()))
    torch.testing.assert_close(decoder(features(2)), segmenter.logits(features(2)))
