"""The table of docs/loops.md has every error that the balancer and the engines raise, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "loops.md").read_text()


def messages() -> list[str]:
    """The text of every error that balance/ and zero/ raise or return; values are "{}"."""
    found = []
    for folder in ("balance", "zero"):
        for path in sorted((ROOT / "allinone_ds" / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                error = getattr(node, "exc", None) or (node.value if isinstance(node, ast.Return) else None)
                if not isinstance(error, ast.Call) or not error.args:
                    continue
                if isinstance(node, ast.Return) and ast.unparse(error.func) not in ("ConfigError", "UnsupportedEngine"):
                    continue
                found.append(_text(error.args[0]))
    return [text for text in found if sum(map(str.isalpha, text)) > 5]  # the others are values only


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""


def fragments() -> list[str]:
    table = PAGE.split("\n## Errors\n")[1]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    return [fragment for row in rows for fragment in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_the_table_has_every_error() -> None:
    known = fragments()
    missing = [text for text in messages() if not any(fragment in text for fragment in known)]
    assert not missing, missing


def test_the_table_has_no_error_that_does_not_exist() -> None:
    sources = [p.read_text() for p in (ROOT / "allinone_ds").rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    gone = [fragment for fragment in fragments() if fragment not in joined]
    assert not gone, gone
