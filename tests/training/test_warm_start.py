"""A run starts from the weights of another run, where they fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.run_files import ModelFacts, read_run_files
from allinone_ds.training.warm_start import start_from
from tests.export.untrained import untrained_run


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with fresh weights on the demo's tiny data."""
    folder = tmp_path_factory.mktemp("score") / "run"
    untrained_run(folder, "conv", home=home)
    return folder


def test_weights_of_a_different_run_are_loaded_where_they_fit(run: Path) -> None:
    config, facts = read_run_files(run)
    theirs = load_file(run / "model.safetensors")
    torch.manual_seed(99)
    other = ModelFacts(backbone=facts.backbone, classes={**facts.classes, "det": [*facts.classes["det"][:-1], "hat"]})
    model = build_model(config, other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert start_from(model, run) == ["det"]  # as many classes, one of another name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("tasks.det.") else theirs[name]), name
    sizes = {**facts.backbone.config, "hidden_size": 64}
    wider = ModelFacts(backbone=facts.backbone.model_copy(update={"config": sizes}), classes=facts.classes)
    with pytest.raises(ConfigError, match="model.start_from: the backbone.*differs"):
        start_from(build_model(config, wider), run)
