"""A run's folder without training: its configuration, and a model with random weights as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.build import build_model, open_train_data
from allinone_ds.run_config.run_files import ModelFacts, save_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.names import WEIGHTS_FILE
from tests.tiny import CLASSES
from tests.tiny_run import tiny_run

RF_DETR = {
    "width": 32,
    "num_queries": 10,
    "groups": 2,
    "self_attention_heads": 4,
    "cross_attention_heads": 4,
    "ffn_dim": 32,
    "decoder_layers": 1,
}


MASK2FORMER = {"width": 32, "num_queries": 12, "encoder_layers": 1, "decoder_layers": 2, "attention_heads": 4}
LIGHT: dict[str, dict[str, Any]] = {}  # the heads of the tiny run
STRONG = {"det": {"head": "rf_detr", "options": RF_DETR}, "seg": {"head": "upernet", "options": {"width": 32}}}
WINNING = {
    "det": {"head": "rf_detr", "options": RF_DETR},
    "seg": {"head": "mask2former", "options": MASK2FORMER},
    "cls": {"head": "arcface", "options": {"width": 32, "sub_centers": 2}},
}


def untrained_run(
    folder: Path,
    stem: str = "patch",
    heads: dict[str, dict[str, Any]] = LIGHT,
    home: Path | None = None,
    model: Mapping[str, Any] | None = None,
    **backbone: Any,
) -> AllInOneModel:
    """Write a run's folder and return its model.

    Args:
        folder: folder of the run.
        stem: stem of the backbone.
        heads: settings by task that replace those of the tiny run.
        home: folder of the demo data whose classes the heads have; None: no data, and the classes of tests.tiny.
        model: further fields of ModelConfig.
        backbone: further fields of BackboneConfig.
    """
    content = tiny_run(home or folder)
    content["output_dir"] = str(folder)
    content["model"]["backbone"].update(stem=stem, **backbone)
    content["model"].update(model or {})
    for name, values in heads.items():
        content["tasks"][name].update(values)
    config = RunConfig.model_validate(content)
    classes = dict.fromkeys(config.tasks, CLASSES)
    if home is not None:
        classes = {name: data.dataset.classes for name, data in open_train_data(config).items()}
    facts = ModelFacts(backbone=config.model.backbone, classes=classes)
    torch.manual_seed(3)
    built = build_model(config, facts).eval()
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in built.named_parameters():  # near zero at first, so that all heads would be alike
            if parameter.requires_grad and name.endswith(("classifier.weight", "cls_logits.weight")):
                parameter.normal_(std=0.5)
    save_run_files(config, facts, folder)
    save_file(built.state_dict(), folder / WEIGHTS_FILE)
    return built
