"""The four kinds with maps in one joint group: one augmentation moves all of them, and each refuses what it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from allinone_ds.data.joint.dataset import view_of
from allinone_ds.errors import AllInOneError
from allinone_ds.run_config.build import build_model, inspect_data, open_train_data
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.strict import explain
from benchmarks.heads.dense_scenes import write_scenes
from tests.tasks.dense.tiny import KINDS
from tests.tiny import TINY


def content(root: Path, augment: list, kinds: tuple[str, ...] = KINDS) -> dict:
    labels: dict[str, dict] = {kind: {"format": "dense_maps", "kind": kind, "maps": f"train/{kind}"} for kind in kinds}
    if "depth" in labels:
        labels["depth"]["scale"] = 0.001
    return {
        "name": "room",
        "data_root": str(root),
        "model": {"backbone": {"stem": "conv", "config": {**TINY, "patch_size": 8, "image_size": 64}}},
        "tasks": {kind: {"type": kind, "options": {"width": 16}} for kind in kinds},
        "joint": {
            "room": {
                "tasks": list(kinds),
                "image_size": [64, 80],
                "batch_size": 2,
                "augment": augment,
                "train": {"format": "joint", "images": "train/images", "labels": labels},
            }
        },
    }


def test_one_augmentation_moves_all_maps(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=4, test=1)
    config = RunConfig.model_validate(content(tmp_path, [{"RandomHorizontalFlip": {"p": 1.0}}]))
    data = open_train_data(config)["room"]
    inspect_data(config, {"room": data}, {})
    sample = data.dataset[0]
    moved = data.transform(sample)
    for kind in KINDS:
        before, after = sample["targets"][kind][kind], moved["targets"][kind][kind]
        assert type(after) is type(before)
        expected = before.flip(-1) * (torch.tensor([-1, 1, 1]).view(3, 1, 1) if kind == "normals" else 1)
        torch.testing.assert_close(after.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), equal_nan=True)
    facts = ModelFacts(backbone=config.model.backbone, classes=dict.fromkeys(KINDS, []))
    model = build_model(config, facts)
    for kind, task in model.tasks.items():
        view = view_of(moved, kind)
        batch = task.collate([view])
        assert task.count_labels(batch["labels"]) == 64 * 80
        assert model(kind, **batch).loss.item() > 0
        empty = task.collate([type(task).unlabelled(view_of({**moved, "targets": {}}, kind))])
        assert task.count_labels(empty["labels"]) == 0 and model(kind, **empty).loss.item() == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("ElasticTransform", "ElasticTransform cannot move normals correctly"),
        ({"RandomAffine": {"degrees": 5, "shear": 5}}, "RandomAffine cannot move normals correctly with 'shear'"),
        ("Mosaic", "Mosaic supports only"),
    ],
)
def test_what_one_kind_refuses_the_group_refuses(tmp_path: Path, entry, message: str) -> None:
    with pytest.raises((ValidationError, AllInOneError)) as raised:
        RunConfig.model_validate(content(tmp_path, [entry]))
    text = (
        explain(raised.value, RunConfig, "x.yaml") if isinstance(raised.value, ValidationError) else str(raised.value)
    )
    assert message in text
    if entry != "Mosaic":  # the others can be moved so
        RunConfig.model_validate(content(tmp_path, [entry], ("depth", "edges", "saliency")))
