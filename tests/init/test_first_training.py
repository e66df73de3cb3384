"""The file that `init` writes trains."""

from __future__ import annotations

import json
from pathlib import Path

from allinone_ds import cli
from tests.init.layouts import maps_binary, table, yolo_without_yaml
from tests.tiny_run import launch


def test_two_steps_of_a_file_that_init_wrote(tmp_path: Path) -> None:
    writers = {"signs": yolo_without_yaml, "cracks": maps_binary, "dogs": table}
    for name, write in writers.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        write(tmp_path / "data" / name)
    output = tmp_path / "first.yaml"
    assert cli.main(["init", str(tmp_path / "data"), "--output", str(output)]) == 0
    settings = ["trainer.max_steps=2", "trainer.save_steps=2", "trainer.eval_steps=2"]
    launch(tmp_path, "torchrun", *settings, ranks=1, config="first.yaml")
    metrics = json.loads((tmp_path / "runs" / "first" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert {"eval_signs_map50", "eval_cracks_miou", "eval_dogs_top1"} <= set(metrics)
