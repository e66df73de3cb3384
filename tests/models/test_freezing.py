"""A frozen part of the backbone is what its name says, for each architecture."""

from __future__ import annotations

import pytest

from allinone_ds.errors import ConfigError
from allinone_ds.models.freezing import freeze_backbone
from tests.tiny import tiny_backbone


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"])
def test_embeddings_and_the_first_layers_are_frozen(model_type: str) -> None:
    def trained(freeze: int | str | None) -> set[str]:
        backbone = tiny_backbone(model_type)
        freeze_backbone(backbone, freeze)  # type: ignore[arg-type]
        return {name for name, value in backbone.named_parameters() if value.requires_grad}

    every = trained(None)
    embeddings = {name for name in every if "embeddings." in name}
    first = {name for name in every if ".layer.0." in name}
    second = {name for name in every if ".layer.1." in name}
    assert embeddings and first and len(first) == len(second)
    assert trained("embeddings") == trained(0) == every - embeddings
    assert trained(1) == every - embeddings - first
    assert trained(2) == every - embeddings - first - second
    assert trained("backbone") == set()
    with pytest.raises(ConfigError, match="model.freeze = 3: the backbone has 2 layers"):
        trained(3)
