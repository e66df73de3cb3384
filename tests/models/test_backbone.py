"""The backbone: every ViT and stem gives maps of the promised shape, and bad settings are named."""

import pytest
import torch

from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig, ConvStem, build_backbone
from tests.tiny import TINY, tiny_backbone

TYPES = ["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"]


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_maps_have_the_promised_shape_at_any_size(model_type, stem, size):
    backbone = tiny_backbone(model_type, stem)
    maps = backbone(torch.randn(2, 3, *size)).feature_maps
    assert len(maps) == backbone.num_levels == 2
    for level in maps:
        assert level.shape == (2, backbone.channels, size[0] // backbone.stride, size[1] // backbone.stride)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_trained_parameter_gets_a_gradient(model_type):
    backbone = tiny_backbone(model_type, "conv")
    sum(level.square().mean() for level in backbone(torch.randn(2, 3, 32, 32)).feature_maps).backward()
    without = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("model_type", TYPES)
def test_bfloat16_weights_take_float32_pixels(model_type):
    backbone = tiny_backbone(model_type, "conv").bfloat16()
    maps = backbone(torch.randn(2, 3, 32, 32)).feature_maps
    assert all(level.dtype == torch.bfloat16 and level.isfinite().all() for level in maps)


def test_sdpa_is_the_attention():
    assert tiny_backbone("dinov2").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("stride", [2, 4, 8, 14, 16])
def test_conv_stem_has_the_stride_of_a_patch(stride):
    stem = ConvStem(3, 32, stride)
    assert stem(torch.randn(1, 3, 3 * stride, 2 * stride)).shape == (1, 32, 3, 2)


def test_layers_are_spread_and_may_be_chosen():
    fields = dict(TINY, num_hidden_layers=12)
    assert build_backbone(BackboneConfig(config=fields)).config.out_indices == [3, 6, 9, 12]
    assert build_backbone(BackboneConfig(config=fields, out_indices=[4, 12])).num_levels == 2


def test_a_local_checkpoint_gives_its_weights(tmp_path):
    torch.manual_seed(1)
    source = tiny_backbone("dinov2", "patch")
    source.net.save_pretrained(tmp_path)
    loaded = build_backbone(BackboneConfig(checkpoint=str(tmp_path)))
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(source.eval()(pixels).feature_maps[-1], loaded.eval()(pixels).feature_maps[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"hiden_size": 64}}, "did you mean 'hidden_size'"),
        ({"config": TINY, "out_indices": [1, 9]}, "from 1 to 2"),
        ({"config": TINY, "out_indices": [2, 1]}, "increasing"),
        ({"config": {**TINY, "num_attention_heads": 0}}, "num_attention_heads 0"),
        ({"config": {**TINY, "num_hidden_layers": 0}}, "num_hidden_layers 0"),
        ({"config": {**TINY, "num_channels": 1}}, "num_channels 1"),
        ({"config": {**TINY, "reshape_hidden_states": False}}, "reshape_hidden_states: must be true"),
        ({"config": {**TINY, "hidden_size": "32"}}, "'hidden_size' expected int, got str"),
        ({"checkpoint": "nowhere", "stem": "conv"}, "use 'patch'"),
        ({"checkpoint": "/nowhere/at/all"}, "nowhere"),
        (
            {"config": TINY | {"num_attention_heads": 3}},
            r"hidden_size 32 must be a multiple of num_attention_heads \(3\)$",
        ),
        (
            {"model_type": "dinov3_vit", "config": {"hidden_size": 36, "num_attention_heads": 6}},
            "hidden_size 36 .* with a multiple of 4 channels per head",
        ),
        ({"config": TINY | {"drop_path_rate": 1.0}}, r"drop_path_rate = 1\.0; allowed: at least 0 and below 1"),
        ({"config": TINY | {"drop_path_rate": -0.1}}, r"drop_path_rate = -0\.1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig(**settings))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tiny_backbone("dinov2", "patch").net.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a 'dinov2'"):
        build_backbone(BackboneConfig(model_type="vitdet", checkpoint=str(tmp_path)))


def test_sizes_that_are_no_multiple_of_the_patch_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny_backbone()(torch.randn(1, 3, 30, 32))
