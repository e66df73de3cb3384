"""`init` recognises maps of depth, normals, edges and saliency, and writes a file that trains on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allinone_ds.data.check import check_sources
from allinone_ds.init.first_run import write_first_run
from allinone_ds.init.recognise import recognise
from allinone_ds.run_config.build import build_model, classes_of, open_train_data
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import load_config
from benchmarks.heads.dense_scenes import write_scenes
from tests.tasks.dense.tiny import KINDS


def test_all_kinds_of_one_folder(tmp_path: Path) -> None:
    write_scenes(tmp_path / "room", train=6, test=3)
    found = recognise(tmp_path / "room")
    assert {name: task.kind for name, task in found.items()} == {f"room_{kind}": kind for kind in KINDS}
    assert found["room_depth"].train == {
        "format": "dense_maps", "kind": "depth", "images": "train/images", "maps": "train/depth", "scale": 0.001,
    }  # fmt: skip
    assert found["room_edges"].test == {
        "format": "dense_maps", "kind": "edges", "images": "test/images", "maps": "test/edges",
    }  # fmt: skip
    first = write_first_run([tmp_path / "room"], tmp_path / "run.yaml", gpu=False)
    text = (tmp_path / "run.yaml").read_text()
    assert "0 classes" not in text and "# classes:" not in text and "taken for millimetres" in text
    config = load_config(first.file)
    data = open_train_data(config)
    assert list(data) == list(first.groups) == ["room"] and data["room"].joint.tasks == tuple(config.tasks)
    sources = {name: group.train_source for name, group in config.joint.items()}
    assert check_sources(sources, config.data_root, progress=False) == [] and first.problems == []
    build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes_of(data)))


def test_maps_beside_label_maps_and_without_parts(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
    for folder in ("images", "masks", "depth_npy", "saliency"):
        (tmp_path / folder).mkdir()
    for i in range(8):
        Image.fromarray(np.stack([np.roll(grey, i)] * 3, -1)).save(tmp_path / "images" / f"{i}.jpg")
        Image.fromarray(grey % 3).save(tmp_path / "masks" / f"{i}.png")
        np.save(tmp_path / "depth_npy" / f"{i}.npy", 1 + grey / 50)
        Image.fromarray(grey).save(tmp_path / "saliency" / f"{i}.png")
    found = {task.kind: task for task in recognise(tmp_path).values()}
    assert set(found) == {"segmentation", "depth", "saliency"}
    assert found["segmentation"].train["label_maps"] == "masks"
    assert "scale" not in found["depth"].train and found["depth"].notes == []
    assert found["saliency"].train["threshold"] == 127 and "above 127 count" in found["saliency"].notes[0]
    write_first_run([tmp_path], tmp_path / "run.yaml", gpu=False)


@pytest.mark.parametrize("folder", ["depth", "normals", "saliency"])
def test_a_folder_of_photos_with_such_a_name_is_not_taken_for_maps(tmp_path: Path, folder: str) -> None:
    for name in (folder, "other"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / name / f"{name}{i}.jpg")
    [task] = recognise(tmp_path).values()
    assert task.kind == "classification"
