"""Named backbones have their published size; drop path acts in training only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from allinone_ds.models.backbone import NAMED, BackboneConfig, build_backbone
from tests.tiny import samples, tiny_backbone, tiny_model


# parameters as the papers give them, in millions
@pytest.mark.parametrize(
    ("name", "millions"), [("vit_l", 303), ("vit_g", 1011), ("dinov2_g", 1137), ("dinov3_7b", 6716)]
)
def test_named_backbones_have_their_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))  # type: ignore[call-arg]
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    assert backbone.num_levels == 4 and backbone.channels == NAMED[name][1]["hidden_size"]
    assert backbone.config._attn_implementation == "sdpa"


def test_a_named_backbone_is_spelled_out_and_its_fields_can_be_replaced() -> None:
    cfg = BackboneConfig(name="dinov2_g", config={"drop_path_rate": 0.3, "patch_size": 16})
    assert cfg.name is None and cfg.model_type == "dinov2"
    assert cfg.config["hidden_size"] == 1536 and cfg.config["patch_size"] == 16 and cfg.config["drop_path_rate"] == 0.3
    assert BackboneConfig.model_validate(cfg.model_dump()) == cfg
    with pytest.raises(ValueError, match="did you mean 'vit_l'"):
        BackboneConfig(name="vit_ll")
    with pytest.raises(ValueError, match="model_type is 'vitdet'"):
        BackboneConfig(name="vit_l", model_type="vitdet")


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"])
def test_drop_path_drops_in_training_only(model_type: str) -> None:
    torch.manual_seed(0)
    more = {"pos_embed_rescale": None} if model_type == "dinov3_vit" else {}
    backbone = tiny_backbone(model_type, drop_path_rate=0.5, **more)
    pixels = torch.randn(8, 3, 32, 32)
    backbone.train()
    one, two = (backbone(pixels).feature_maps[-1] for _ in range(2))
    assert not torch.equal(one, two)
    dropping = [module for name, module in backbone.named_modules() if name.endswith("drop_path")]
    dropping = [module for module in dropping if not isinstance(module, nn.Identity)]  # vitdet's rate starts at 0
    assert len(dropping) == (1 if model_type == "vitdet" else 2)
    for module in dropping:  # whole samples go, and the others make up for them
        out = module(torch.ones(4000, 2, 3))
        assert module.drop_prob == 0.5 and set(out.unique().tolist()) == {0.0, 2.0}
        assert (out == out[:, :1, :1]).all() and abs(float(out.mean()) - 1) < 0.1
    backbone.eval()
    assert torch.equal(backbone(pixels).feature_maps[-1], backbone(pixels).feature_maps[-1])


def test_attention_and_checkpointing_serve_the_rotary_backbone_too() -> None:
    model = tiny_model(model_type="dinov3_vit", num_register_tokens=4, pos_embed_rescale=None)
    assert model.config._attn_implementation == "sdpa"
    model.activation_checkpointing_enable()
    model("cls", **model.tasks["cls"].collate(samples())).loss.backward()
    assert all(p.grad is not None for n, p in model.backbone.named_parameters() if p.requires_grad), "no gradient"
