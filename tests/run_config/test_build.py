"""A backbone that came from a checkpoint is built again without it."""

from __future__ import annotations

from pathlib import Path

from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.run_config.build import without_checkpoint
from tests.tiny import TINY


def test_a_backbone_from_a_checkpoint_is_built_again_without_it(tmp_path: Path) -> None:
    first = build_backbone(BackboneConfig(config=TINY))
    first.net.save_pretrained(tmp_path)
    asked = BackboneConfig(checkpoint=str(tmp_path), out_indices=[1, 2])
    again = build_backbone(without_checkpoint(asked, build_backbone(asked).config))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in first.named_parameters()}
    assert again.num_levels == 2
