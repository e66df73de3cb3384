"""Every path of a configuration is expanded once, and files of every usual encoding are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from allinone_ds import cli
from allinone_ds.errors import ConfigError
from allinone_ds.followed_run import folder_of
from allinone_ds.run_config.arguments import arguments_from_config
from allinone_ds.run_config.run_files import save_config
from allinone_ds.run_config.schema import load_config
from allinone_ds.run_config.yaml_files import read_deepspeed, read_yaml
from allinone_ds.run_folder.checkpoints import check_resume, parse_resume
from tests.tiny_run import tiny_run


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny run in the home folder, which $PLACE names, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    return path


@pytest.mark.parametrize("start", ["~", "$PLACE", "$HOME"])
def test_the_folder_of_a_run_is_one(file: Path, start: str) -> None:
    override = f"output_dir={start}/runs/x"
    config = load_config(file, [override])
    expected = file.parent / "runs" / "x"
    assert config.run_dir == expected == Path(str(arguments_from_config(config).output_dir))
    assert folder_of(read_yaml(file, [override])) == expected  # of the log that the command follows
    (expected / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds checkpoint-3"):
        check_resume(False, config.run_dir)
    assert load_config(save_config(config, file.parent)) == config


@pytest.mark.parametrize("start", ["~", "$PLACE"])
def test_every_path_of_a_run_is_expanded(file: Path, start: str) -> None:
    for name in ("data", "earlier", "weights"):
        (file.parent / name).mkdir()
    (file.parent / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    (file.parent / "augment.yaml").write_text("branches: {all: {probability: 1, transforms: [RandomHorizontalFlip]}}")
    (file.parent / "above.yaml").write_text(yaml.safe_dump({"base": f"{start}/tiny.yaml", "name": "above"}))
    overrides = {
        "data_root": "data",
        "model.start_from": "earlier",
        "model.backbone.checkpoint": "weights",
        "deepspeed": "zero.json",
        "tasks.cls.augment": "augment.yaml",
        "tasks.det.train.images": "data/images",
    }
    config = load_config(f"{start}/above.yaml", [f"{key}={start}/{value}" for key, value in overrides.items()])
    home = file.parent
    assert config.name == "above" and config.data_root == home / "data"
    assert config.model.start_from == home / "earlier" and config.model.backbone.checkpoint == str(home / "weights")
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}
    assert "all" in config.tasks["cls"].augment.branches
    assert config.tasks["det"].train.images == str(home / "data" / "images")  # type: ignore[attr-defined]
    assert parse_resume(f"{start}/runs/x") == home / "runs" / "x"


def test_a_variable_that_is_not_set_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"output_dir: \$NO_SUCH/x: \$NO_SUCH is not set in the environment"):
        load_config(file, ["output_dir=$NO_SUCH/x"])
    with pytest.raises(ConfigError, match=r"write \$NAME or \$\{oc\.env:NAME\}"):
        file.write_text(file.read_text() + "output_dir: ${NO_SUCH}/x\n".replace("output_dir", "data_root_of_mine"))
        load_config(file)


def test_paths_of_the_command_line_are_expanded(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "~/runs/none"]) == 2
    assert f"{file.parent}/runs/none holds no config.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", "$NO_SUCH/x"])
    assert "$NO_SUCH is not set" in capsys.readouterr().err


def test_a_base_may_lie_beside_its_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "sub").mkdir()
    (file.parent / "sub" / "above.yaml").write_text("base: ../tiny.yaml\nname: above\n")
    monkeypatch.chdir("/")
    assert load_config(file.parent / "sub" / "above.yaml").name == "above"


# ---- encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_files_of_every_usual_encoding_are_read(file: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    file.write_bytes((mark + file.read_text().replace("name: tiny", "name: Käfer")).encode(encoding))
    assert load_config(file).name == "Käfer"
    (file.parent / "zero.json").write_bytes((mark + '{"zero_optimization": {"stage": 1}}').encode(encoding))
    assert read_deepspeed(file.parent / "zero.json") == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("content", ["name: Käfer".encode("latin-1"), b"\x00\x01\x02", "name: a".encode("utf-16-le")])
def test_files_that_are_no_text_are_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tiny\.yaml: is not text in UTF-8 or UTF-16 .*save it as UTF-8"):
        load_config(file)


def test_a_deepspeed_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_bytes('{"a": "ä"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"zero\.json is not valid JSON"):
        read_deepspeed(tmp_path / "zero.json")


# ---- names


@pytest.mark.parametrize("name", ["a/b", "a.b", "../x", "a b", "", "-x", "a=b", "a\\b"])
def test_names_of_tasks_that_files_and_modules_cannot_have_are_refused(file: Path, name: str) -> None:
    content = yaml.safe_load(file.read_text())
    content["tasks"][name] = content["tasks"].pop("cls")
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="cannot name a task; use letters, digits, _ and -"):
        load_config(file)


@pytest.mark.parametrize("name", ["cls_2", "lane-marks", "2d", "Fußgänger"])
def test_other_names_of_tasks_are_accepted(file: Path, name: str) -> None:
    content = yaml.safe_load(file.read_text())
    content["tasks"][name] = content["tasks"].pop("cls")
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    assert name in load_config(file).tasks


def test_an_override_that_is_not_utf_8_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"caf\\udce9': is not UTF-8; rename the folder, or make a link"):
        load_config(file, ["data_root=/x/caf\udce9"])


def test_names_that_the_terminal_cannot_show_do_not_end_a_command(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "caf\udce9.yaml"]) == 2
    assert "caf\\udce9.yaml" in capsys.readouterr().err
