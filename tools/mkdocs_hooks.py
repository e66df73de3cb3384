"""Hooks of `mkdocs build`: pages from the repository's root, and links to files outside of docs/.

CONTRIBUTING.md and CHANGELOG.md become pages of the site. A link to a different file of the repository, which GitHub
can open but the site cannot, becomes the file's path in code type; a link to a file that does not exist is a warning,
which `strict` turns into an error.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]+)\]\(([^):#\s]+)\)")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        text = LINK.sub(lambda m: f"[{m[1]}]({m[2].removeprefix('docs/')})", (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = ROOT / "docs" / Path(page.file.src_uri).parent

    def outside(match: re.Match[str]) -> str:
        text, target = match.groups()
        file = (folder / target).resolve()
        if file.is_relative_to(ROOT / "docs") or page.file.src_uri in PAGES.values():
            return match[0]
        if not file.exists():
            log.warning("%s: link to '%s', which does not exist", page.file.src_uri, target)
        path = file.relative_to(ROOT).as_posix()
        if path in PAGES:
            return f"[{text}]({'../' * page.file.src_uri.count('/')}{PAGES[path]})"
        return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"

    return LINK.sub(outside, markdown)
