"""Self-contained HTML pages: one style, escaped text, images embedded in the file."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px }
body { margin: 1.5rem auto; padding: 0 1rem }
h1, p { overflow-wrap: anywhere } img { max-width: 100%; height: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin-bottom: 1rem }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.good, .bad { padding: .5rem 1rem } .good { background: #dfd } .bad { background: #fdd }
"""


def page(title: str, *parts: str) -> str:
    """Returns a whole page: the title as its heading, then `parts`, which must be HTML."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"{element('h1', title)}{''.join(parts)}</html>\n"
    )


def element(tag: str, text: str, css_class: str = "") -> str:
    """Returns one element that holds escaped text."""
    attribute = f' class="{escape(css_class)}"' if css_class else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table that scrolls sideways on a narrow screen. An empty header adds no row."""
    cells = [[element("td", cell) for cell in row] for row in rows]
    names = [element("th", name) for name in header]
    lines = "".join(f"<tr>{''.join(line)}</tr>" for line in [names, *cells] if line)
    return f'<div class="scroll"><table>{lines}</table></div>'


def image(path: Path) -> str:
    """Returns an <img> with the PNG file embedded."""
    return picture(path.stem, path.read_bytes())


def picture(alt: str, png: bytes) -> str:
    """Returns an <img> with a PNG embedded."""
    encoded = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{encoded}">'
