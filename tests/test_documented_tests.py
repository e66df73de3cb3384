"""Every test that a page of docs/ names exists, and each finding of docs/gpu.md has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DEFINED = {
    name
    for folder in ("tests", "allinone_ds")
    for file in (ROOT / folder).rglob("*.py")
    for name in re.findall(r"def ((?:test|check)_\w+)", file.read_text())
}
"""Names of tests, checks on ranks, and methods of the package with such a name."""
OPTIONS = {"check_ranks", "test_time"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"`((?:test|check)_\w+)`", text)) <= DEFINED | OPTIONS
    assert [name for name in re.findall(r"`(tests/[\w/]+(?:\.py)?)`", text) if not (ROOT / name).exists()] == []


def test_every_finding_of_the_audit_has_a_row_with_a_test() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text().partition("## What was mended")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line[:3] > "| 0"]
    rows = [row for row in rows if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, 40))
    without = [int(row[0]) for row in rows if "`" not in row[3]]
    assert without == [29, 37], "additions that are not deterministic, and a variable that DeepSpeed cannot read"
