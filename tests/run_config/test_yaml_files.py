"""Files with bases and overrides: what replaces what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.yaml_files import read_yaml


def written(folder: Path, file: str, **content: Any) -> Path:
    (folder / file).write_text(yaml.safe_dump(content))
    return folder / file


def test_later_bases_replace_earlier_ones_and_the_file_replaces_both(tmp_path: Path) -> None:
    first = written(tmp_path, "first.yaml", name="first", trainer={"max_steps": 1, "seed": 1, "optim": "sgd"})
    second = written(tmp_path, "second.yaml", base=str(first), trainer={"max_steps": 2})
    third = written(tmp_path, "third.yaml", trainer={"seed": 3}, data_root="there")
    run = written(tmp_path, "run.yaml", base=[str(second), str(third)], trainer={"optim": "adafactor"})
    assert read_yaml(run) == {
        "name": "first",
        "data_root": "there",
        "trainer": {"max_steps": 2, "seed": 3, "optim": "adafactor"},
    }


def test_a_base_may_be_reached_twice_but_not_lead_back(tmp_path: Path) -> None:
    shared = written(tmp_path, "shared.yaml", name="shared")
    left = written(tmp_path, "left.yaml", base=str(shared))
    right = written(tmp_path, "right.yaml", base=str(shared))
    assert read_yaml(written(tmp_path, "run.yaml", base=[str(left), str(right)])) == {"name": "shared"}
    written(tmp_path, "shared.yaml", base=str(left))
    with pytest.raises(ConfigError, match="base leads back"):
        read_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("below", "above"),
    [
        (["a", "b"], ["c"]),
        ({"branches": {"x": ["a"]}}, ["c"]),
        (["a"], {"branches": {"x": ["c"]}}),
        (["a"], "file.yaml"),
        ({"branches": {}}, "file.yaml"),
        ("file.yaml", ["c"]),
    ],
)
def test_a_list_and_a_value_of_a_different_kind_replace_as_a_whole(tmp_path: Path, below: Any, above: Any) -> None:
    written(tmp_path, "below.yaml", tasks={"cls": {"augment": below, "batch_size": 2}})
    run = written(tmp_path, "run.yaml", base=str(tmp_path / "below.yaml"), tasks={"cls": {"augment": above}})
    assert read_yaml(run)["tasks"]["cls"] == {"augment": above, "batch_size": 2}


def test_a_task_that_is_null_is_dropped(tmp_path: Path) -> None:
    task = {"type": "classification"}
    below = written(tmp_path, "below.yaml", tasks={"a": task, "b": task, "c": task})
    run = written(tmp_path, "run.yaml", base=str(below), tasks={"a": None})
    assert list(read_yaml(run, ["tasks.b=null"])["tasks"]) == ["c"]
    assert list(read_yaml(run, ["tasks.b=null", "tasks.b.type=classification"])["tasks"]) == ["b", "c"]


def test_an_override_of_one_deepspeed_key_keeps_the_default_file(tmp_path: Path) -> None:
    content = read_yaml(written(tmp_path, "run.yaml", name="x"), ["deepspeed.zero_optimization.stage=1"])
    assert content["deepspeed"]["zero_optimization"]["stage"] == 1
    assert content["deepspeed"]["gradient_clipping"] == 0.0
