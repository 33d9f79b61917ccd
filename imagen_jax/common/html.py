"""Self-contained HTML pages: one style, escaped text, images embedded in the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px }
body { margin: 1.5rem auto; padding: 0 1rem }
h1, p { overflow-wrap: anywhere } img { max-width: 100%; height: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin-bottom: 1rem }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
.good, .bad { padding: .5rem 1rem } .good { background: #dfd } .bad { background: #fdd }
summary { cursor: pointer; font-weight: 600 }
.bar { display: block; position: relative; min-width: 6rem; height: .4rem; background: #eee }
.bar i, .bar b { position: absolute; height: 100% } .bar i { background: #9bc }
.bar b { background: #000; width: 2px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem } .card p { margin: .3rem 0 }
.row { display: flex; gap: .4rem } figure { margin: 0; flex: 0 1 7rem; min-width: 0 }
figure img { width: 100%; display: block; box-shadow: 0 0 0 1px #ddd }
figcaption { font-size: .75rem; color: #555 }
.pixels { image-rendering: pixelated }
ul.claims { list-style: none; margin: .3rem 0; padding: 0; font-size: .9rem }
.yes::before { content: "\\2713  "; color: #080 } .no::before { content: "\\2717  "; color: #b00 }
.slider input { width: 100%; max-width: 560px } .slider img { display: none }
.slider img.on { display: block }
@media (max-width: 600px) {
.stack th { display: none } .stack tr { display: block; margin-bottom: 1rem }
.stack td { display: grid; grid-template-columns: 7rem 1fr; gap: .5rem; padding: .25rem 0 }
.stack td, .stack td:first-child { text-align: left } .stack td:first-child { font-weight: 600 }
.stack td::before { content: attr(data-name); font-weight: 400; color: #555 }
}
"""
# Shows the picture that the slider selects, and its name.
SLIDE = """
document.querySelectorAll(".slider").forEach(box => {
  const range = box.querySelector("input"), images = box.querySelectorAll("img");
  const update = () => images.forEach((image, i) => {
    image.className = i == range.value ? "on" : "";
    if (i == range.value) box.querySelector("output").textContent = image.alt;
  });
  range.addEventListener("input", update);
  update();
});
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
    return wrap(tag, css_class, escape(text))


def wrap(tag: str, css_class: str, *parts: str) -> str:
    """Returns one element around `parts`, which must be HTML."""
    attribute = f' class="{escape(css_class)}"' if css_class else ""
    return f"<{tag}{attribute}>{''.join(parts)}</{tag}>"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table that scrolls sideways on a narrow screen. An empty header adds no row."""
    cells = [[element("td", cell) for cell in row] for row in rows]
    names = [element("th", name) for name in header]
    return wrap("div", "scroll", wrap("table", "", *_rows([names, *cells])))


def stacking_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table whose rows become blocks on a narrow screen; `rows` must be HTML."""
    header = list(header)
    cells = [
        [
            f'<td data-name="{escape(name)}"><span>{cell}</span></td>'
            for name, cell in zip(header, row, strict=True)
        ]
        for row in rows
    ]
    return wrap("table", "stack", *_rows([[element("th", name) for name in header], *cells]))


def _rows(lines: list[list[str]]) -> Iterable[str]:
    return (wrap("tr", "", *line) for line in lines if line)


def interval(value: float, low: float, high: float) -> str:
    """Returns a bar from 0 to 1 with an interval and a mark at `value`."""
    band = f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
    return f'<span class="bar">{band}<b style="left:{100 * value:.1f}%"></b></span>'


def details(summary: str, *parts: str) -> str:
    """Returns a closed section that opens on a click; `parts` must be HTML."""
    return wrap("details", "", element("summary", summary), *parts)


def image(path: Path) -> str:
    """Returns an <img> with the PNG file embedded."""
    return _img(path.stem, "png", path.read_bytes())


def picture(pixels: np.ndarray | Image.Image, name: str, most: int = 256) -> str:
    """Returns an <img> of a picture: small ones as PNG, others as WebP of at most `most` pixels.

    Args:
      pixels: uint8 [H, W, 3], or an image.
      name: the text for readers who cannot see it.
      most: largest width.
    """
    shown = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    if shown.width <= 64:
        shown.save(file, "png", optimize=True)
        return _img(name, "png", file.getvalue(), ' class="pixels"')
    if shown.width > most:
        shown = shown.resize((most, most * shown.height // shown.width), Image.Resampling.LANCZOS)
    shown.convert("RGB").save(file, "webp", quality=85)
    return _img(name, "webp", file.getvalue())


def slider(pictures: Sequence[str]) -> str:
    """Returns pictures of which a slider shows one, the last at first; its text is below."""
    last = len(pictures) - 1
    control = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="picture">'
    body = wrap("div", "slider", control, "<p><output></output></p>", *pictures)
    return f"{body}<script>{SLIDE}</script>"


def data_url(kind: str, data: bytes) -> str:
    """Returns the URL that holds an encoded picture; `kind` is png, webp and so on."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _img(name: str, kind: str, data: bytes, more: str = "") -> str:
    return f'<img alt="{escape(name)}"{more} src="{data_url(kind, data)}">'
