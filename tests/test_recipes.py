"""Every YAML block of docs/recipes.md is a file that `check` accepts, and every command is one that there is."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import Dinov2Backbone, Dinov2Config

from allinone_ds.cli import _parser
from allinone_ds.init.first_run import write_first_run
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.run_files import ModelFacts, save_run_files
from allinone_ds.run_config.schema import load_config
from allinone_ds.run_folder.names import WEIGHTS_FILE
from allinone_ds.training.start.run_check import check_run
from tests.init.layouts import coco_one_json, folders_plain, folders_split, maps_two_folders

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
BLOCKS = {
    f"{title} {number}": text
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", "## Start\n" + PAGE, re.M | re.S)
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", section, re.S), 1)
}
COMMANDS = re.findall(r"^    (allinone-ds .*)$", PAGE, re.M)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data that the page names, run.yaml, runs/first and a pretrained checkpoint."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, write in (("signs", coco_one_json), ("streets", maps_two_folders), ("cars", folders_plain)):
        (folder / name).mkdir()
        write(folder / name)
    for name in ("day", "night"):
        shutil.copytree(folder / "signs", folder / name)
    folders_split(folder / "trucks")
    (folder / "trucks" / "val").rename(folder / "trucks" / "test")
    first = write_first_run([folder / name for name in ("signs", "streets", "cars")], folder / "run.yaml", gpu=False)
    config = load_config(folder / "run.yaml", [f"output_dir={folder / 'runs' / 'first'}"])
    facts = ModelFacts(backbone=config.model.backbone, classes={n: t.classes for n, t in first.tasks.items()})
    save_run_files(config, facts, folder / "runs" / "first")
    save_file(build_model(config, facts).state_dict(), folder / "runs" / "first" / WEIGHTS_FILE)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    torch.manual_seed(0)
    Dinov2Backbone(Dinov2Config(**sizes)).save_pretrained(folder / "dinov2")
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code is not None
    (folder / "my_callbacks.py").write_text(code[1])
    return folder


@pytest.mark.parametrize("name", BLOCKS)
def test_a_recipe_would_train(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    content = yaml.safe_load(BLOCKS[name])
    base = yaml.safe_load((home / "run.yaml").read_text())
    if "checkpoint" in content.get("model", {}).get("backbone", {}):  # it replaces what is below model.backbone
        del base["model"]["backbone"]
        for task in base["tasks"].values():
            task["image_size"] = [56, 84]
        content["model"]["backbone"]["checkpoint"] = str(home / "dinov2")
    (home / "base.yaml").write_text(yaml.safe_dump(base))
    content.setdefault("base", "base.yaml")
    (home / "recipe.yaml").write_text(yaml.safe_dump({"name": "recipe", **content}))
    config, problems, _ = check_run(home / "recipe.yaml", [], ranks=3)
    assert problems == [] and config is not None
    for key, value in content.items():  # nothing of it is ignored
        if key == "tasks":
            assert value.keys() <= config.tasks.keys()


def test_the_recipes_are_those_that_are_asked_for() -> None:
    titles = re.findall(r"^## (.*)$", PAGE, re.M)
    wanted = (
        "own data",
        "pretrained",
        "run of your own",
        "Freeze",
        "Rates",
        "Early stopping, callbacks",
        "new learning",
    )
    for word in (*wanted, "Add a task", "Imbalance", "Small objects", "Large images", "Many tasks"):
        assert any(word in title for title in titles), word
    assert len(BLOCKS) >= 14


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_exists(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    args, rest = _parser().parse_known_args(words)
    assert all("=" in word for word in rest) and args.run
