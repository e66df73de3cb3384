"""Parts of self-contained HTML pages: document, table, picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

# The content security policy forbids the page to load anything.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem; color: #1b1b1b; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } h4 { font-size: .95rem; margin: 1rem 0 .3rem; }
p { margin: .4rem 0; max-width: 75ch; } .note { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } caption { text-align: left; color: #555; padding: .2rem 0; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font-size: .85rem; } td code { overflow-wrap: break-word; } pre { overflow-x: auto; }
.matrix th, .matrix td { padding: .15rem .4rem; font-size: .85rem; }
.matrix thead th { vertical-align: bottom; } .matrix thead span { writing-mode: vertical-rl; }
.plots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.pictures { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(45%, 200px), 1fr)); }
.beside { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); margin-bottom: 12px; }
.beside.small { grid-template-columns: repeat(auto-fit, minmax(min(45%, 150px), 320px)); }
figure { margin: 0; } figcaption { font-size: .85rem; color: #555; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
@media (max-width: 500px) { body { padding: .7rem; } th, td { padding-right: .55rem; font-size: .85rem; } }
.plots img { width: 100%; max-width: 640px; }
.plots.many { grid-template-columns: repeat(auto-fit, minmax(min(100%, 640px), 1fr)); }
.plots.many img { max-width: 1000px; }
"""


def document(title: str, sections: Sequence[str]) -> str:
    """Return a whole page: a heading, and those sections that are not empty."""
    name = escape(title)
    body = "\n".join([f"<h1>{name}</h1>", *(section for section in sections if section)])
    return f"{HEAD}<title>{name}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], code: bool = False) -> str:
    """Return a table whose first column names the row.

    Args:
        head: names of the C columns.
        rows: C texts each; columns of numbers are aligned to the right.
        code: every cell is program text, also where it is a number.
    """

    def cell(text: str, column: int, tag: str) -> str:
        number = column > 0 and not code and all(_is_number(row[column]) for row in rows)
        attributes = (' scope="col"' if tag == "th" else "") + (' class="number"' if number else "")
        content = f"<code>{escape(text)}</code>" if code and tag == "td" else escape(text)
        return f"<{tag}{attributes}>{content}</{tag}>"

    first = "".join(cell(text, i, "th") for i, text in enumerate(head))
    rest = "".join(f"<tr>{''.join(cell(text, i, 'td') for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


def image(media_type: str, content: bytes, description: str) -> str:
    """Return an image whose content is part of the page."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(description)}" src="data:{media_type};base64,{data}">'


def figure(content: str, caption: str = "") -> str:
    """Return an image with a caption below it."""
    return f"<figure>{content}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text in ("nan", "inf") or text[0] == "-"
