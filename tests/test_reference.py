"""The API reference in docs/reference documents every public name, and every page of docs/ is in the navigation."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import allinone_ds

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_every_public_name_has_an_entry() -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    entries = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)}
    in_errors = {"BalancerError"}  # the page of errors documents a whole module
    assert set(allinone_ds.__all__) - entries == in_errors


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", yaml.dump(config["nav"])))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert listed - {"contributing.md", "changelog.md"} == pages  # these two come from the repository's root
