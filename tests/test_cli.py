"""The command line names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from allinone_ds import cli


def test_command_line_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no configuration file" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["doctor", "a=b"])
