"""Every benchmark can be imported, is in the README with its command, and asks its question in its first line."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "benchmarks" / "README.md").read_text()


def command_of(file: Path) -> str:
    """Return the name with which `python -m` runs a file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


FILES = {command_of(file): file for file in (ROOT / "benchmarks").rglob("*.py") if "\ndef main(" in file.read_text()}


@pytest.mark.parametrize("command", FILES)
def test_a_benchmark_is_listed_and_asks_a_question(command: str) -> None:
    name = f"{command}.__main__" if FILES[command].name == "__main__.py" else command
    text = importlib.import_module(name).__doc__ or ""
    assert "?" in text.splitlines()[0]
    assert f"python -m {command}" in text
    assert f"`{command}" in README


def test_the_readme_lists_no_other_command() -> None:
    assert set(re.findall(r"\| `(benchmarks[.\w]*)", README)) == set(FILES)
