"""A run starts from the weights of another run, where they fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from allinone_ds.errors import ConfigError
from allinone_ds.models.pretrained import LoadedWeights
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.run_files import ModelFacts, read_run_files
from allinone_ds.training.warm_start import StartReport, start_from
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
    loaded = model.backbone.loaded
    heads = [name for name in theirs if name.startswith("tasks.det.")]
    assert loaded is not None and loaded.missing == tuple(sorted(heads)) and loaded.unexpected == ()
    assert str(loaded).startswith(f"model.start_from: {run}") and loaded.loaded == len(theirs) - len(heads)
    sizes = {**facts.backbone.config, "hidden_size": 64}
    wider = ModelFacts(backbone=facts.backbone.model_copy(update={"config": sizes}), classes=facts.classes)
    with pytest.raises(ConfigError, match="model.start_from: the backbone.*differs"):
        start_from(build_model(config, wider), run)


def test_layers_that_are_left_behind_and_settings_that_no_shape_shows_are_said(run: Path) -> None:
    config, facts = read_run_files(run)
    for change, texts in {
        ("num_hidden_layers", 1): ("config.num_hidden_layers = 1 (2 there)", "backbone.net.encoder.layer.1."),
        ("num_attention_heads", 4): ("config.num_attention_heads = 4 (2 there)", "0 unexpected"),
    }.items():
        sizes = {**facts.backbone.config, change[0]: change[1]}
        other = ModelFacts(backbone=facts.backbone.model_copy(update={"config": sizes}), classes=facts.classes)
        model = build_model(config, other)
        start_from(model, run)
        loaded = model.backbone.loaded
        assert loaded is not None and not loaded.complete
        assert all(text in str(loaded) for text in texts), str(loaded)


class FakeTrainer:
    def __init__(self, loaded: LoadedWeights | None) -> None:
        self.model = SimpleNamespace(backbone=SimpleNamespace(loaded=loaded))
        self.said: list[tuple[str, int, str]] = []

    def warn(self, step: int, message: str) -> None:
        self.said.append(("warning", step, message))

    def note(self, step: int, message: str) -> None:
        self.said.append(("note", step, message))


def test_a_run_says_what_it_starts_from_and_warns_of_what_is_missing() -> None:
    whole = LoadedWeights("dino", 9, missing=("embeddings.mask_token",), unexpected=("head.bias",))
    part = LoadedWeights("dino", 9, missing=("layernorm.bias",), unexpected=())
    for loaded, step, kind in ((whole, 0, "note"), (part, 0, "warning"), (part, 3, None), (None, 0, None)):
        trainer = FakeTrainer(loaded)
        StartReport(trainer).on_train_begin(None, SimpleNamespace(global_step=step), None)
        assert trainer.said == ([(kind, 0, str(loaded))] if kind else [])
    assert "8 of 9 tensors loaded" in str(whole) and "1 unexpected (head.bias)" in str(whole)
