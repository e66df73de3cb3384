"""Griffe extension: read the examples of docstrings.

`Example:` holds doctests and becomes griffe's section `Examples:`. `Example::` holds code that needs an engine or a run
and becomes a code block; a `::` on a line of its own below `Example:` means the same.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

LITERAL = re.compile(r"^Example:(?::|\n +::)\n((?:\n| +.*\n?)+)", flags=re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Rewrite the headings before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = LITERAL.sub(_code_block, obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _code_block(match: re.Match[str]) -> str:
    code = textwrap.dedent(match[1]).strip("\n")
    return "**Example:**\n\n" + textwrap.indent(code, "    ") + "\n\n"
