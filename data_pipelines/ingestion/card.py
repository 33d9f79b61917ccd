"""The data card: where a dataset comes from, what was left out, what it holds, and its risks."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from data_pipelines.ingestion import images, shards
from data_pipelines.ingestion.layout import Layout
from data_pipelines.ingestion.summary import Summary, sort_key
from data_pipelines.records import tfrecord
from imagen_jax.common import html, pictures
from imagen_jax.common.files import write_text

MARKDOWN, PAGE = "card.md", "card.html"
_BAR = 24  # characters of the longest bar
_ROWS = 12  # of languages and licenses


class Section(NamedTuple):
    """A heading with a table, a list or a grid of pictures."""

    title: str
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = []  # noqa: RUF012 (never changed)
    notes: list[str] = []  # noqa: RUF012 (never changed)
    picture: bytes = b""


def write(folder: epath.Path, fields: Mapping[str, Any], summary: Summary, layout: Layout) -> None:
    """Writes the card as Markdown, with its pictures in card/, and as one HTML file."""
    sections = [*_tables(fields), *_histograms(summary), *_grids(summary, layout), _risks(fields)]
    title = f"Data card of {fields['name']}"
    text, parts, number = [f"# {title}", ""], [], 0
    if (folder / "card").exists():  # of an interrupted run
        (folder / "card").rmtree()
    (folder / "card").mkdir()
    for section in sections:
        text += [f"## {section.title}", ""]
        parts.append(html.element("h2", section.title))
        if section.rows:
            text += [line(section.header), line(["---"] * len(section.header))]
            text += [*map(line, section.rows), ""]
            parts.append(html.table(section.header, section.rows))
        text += [f"- {note}" for note in section.notes] + [""] * bool(section.notes)
        if section.notes:
            items = "".join(html.element("li", note) for note in section.notes)
            parts.append(f"<ul>{items}</ul>")
        if section.picture:
            number += 1
            name = f"card/{number:02d}.png"
            (folder / name).write_bytes(section.picture)
            text += [f"![{section.title}]({name})", ""]
            encoded = base64.b64encode(section.picture).decode()
            source = f"data:image/png;base64,{encoded}"
            parts.append(f'<img alt="{escape(section.title)}" src="{source}">')
    write_text(folder / MARKDOWN, "\n".join(text).rstrip() + "\n")
    write_text(folder / PAGE, html.page(title, *parts))


def _tables(fields: Mapping[str, Any]) -> Iterable[Section]:
    counts = fields["counts"]
    sizes = [
        (name, f"{split['records']:,}", f"{split['bytes'] / 2**20:,.1f}", str(len(split["shards"])))
        for name, split in fields["splits"].items()
    ]
    note = f"Written on {fields['date']}; {fields['captions']['total']:,} captions."
    yield Section("Contents", ("split", "records", "MiB", "files"), sizes, [note])
    sources = [(s["kind"], s["path"], f"{s['bytes'] / 2**20:,.1f}") for s in fields["sources"]]
    yield Section("Sources", ("format", "path", "MiB read"), sources)
    rows = [("candidates in", f"{counts['candidates']:,}")]
    rows += [(reason, f"-{n:,}") for reason, n in _ranked(counts["rejected"])]
    rows += [("records out", f"{counts['records']:,}")]
    yield Section("What was left out", ("", "number"), rows)
    if changed := counts["changed"]:
        rows = [(what, f"{n:,}") for what, n in _ranked(changed)]
        yield Section("What was converted", ("", "number"), rows)
    rows = [(name, str(value)) for name, value in fields["settings"].items()]
    yield Section("Settings", ("option", "value"), rows)


def _histograms(summary: Summary) -> Iterable[Section]:
    for what, counter in summary.histograms.items():
        if what == "score":
            continue
        names = sorted(counter, key=lambda name, what=what: sort_key(what, name))
        if what in ("language", "license", "format"):
            names = [name for name, _ in _ranked(counter)]
        elif what == "captions of an image":
            names = sorted(counter, key=int)
        total, longest = sum(counter.values()), max(counter.values())
        shown, rest = names[:_ROWS], sum(counter[name] for name in names[_ROWS:])
        rows = [(n, counter[n]) for n in shown] + ([("others", rest)] if rest else [])
        yield Section(
            f"{what[0].upper()}{what[1:]}",
            (what, "number", "share", ""),
            [
                (name, f"{n:,}", f"{n / total:.1%}", "█" * round(_BAR * n / max(longest, rest)))
                for name, n in rows
            ],
            ["Before duplicates were dropped."],
        )


def _grids(summary: Summary, layout: Layout) -> Iterable[Section]:
    stored = {reason: list(_stored(pieces)) for reason, pieces in layout.examples.items()}
    if shown := stored.pop("", None):
        yield Section("Random examples", picture=_grid(shown))
    for reason, several in sorted(summary.pictures.items()):
        thumbs = [(base64.b64decode(data), "") for _, data in several]
        yield Section(f"Left out: {reason}", picture=_grid(thumbs))
    for reason, thumbs in stored.items():
        if thumbs:
            yield Section(f"Left out: {reason}", picture=_grid(thumbs))


def _stored(pieces) -> Iterable[tuple[bytes, str]]:
    for framed in shards.read_pieces(pieces):
        values = tfrecord.decode(tfrecord.data_of(framed))
        with Image.open(io.BytesIO(values["image"][0])) as image:
            yield images.thumbnail(image), values["caption"][0].decode()


def _grid(thumbs: list[tuple[bytes, str]]) -> bytes:
    decoded = [np.asarray(Image.open(io.BytesIO(data))) for data, _ in thumbs]
    sheet = pictures.grid(np.stack(decoded), [text[:120] for _, text in thumbs], columns=8, side=96)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _risks(fields: Mapping[str, Any]) -> Section:
    settings, counts = fields["settings"], fields["counts"]
    accepted, scores = counts["accepted"], counts["scores"]
    notes = [
        "Captions are as found. Nobody has checked whether they are true, fair, or name people.",
        "Training crops images that are not square, so a caption may name what a crop lacks.",
    ]
    for score, flag, what in (
        ("punsafe", "max_unsafe", "sexual or violent content"),
        ("pwatermark", "max_watermark", "watermarks"),
    ):
        missing = accepted - scores.get(score, 0)
        if settings[flag] >= 1:
            notes.append(f"Nothing was left out for {what}: --{flag}=1.")
        elif missing and score == "punsafe" and settings["detect_unsafe"]:
            notes.append(
                f"{missing:,} of {accepted:,} images have no score `punsafe`. nudenet looked for "
                "exposed intimate parts in them, not for other sexual or violent content."
            )
        elif missing:
            notes.append(
                f"{missing:,} of {accepted:,} images have no score `{score}`, so they were not "
                f"filtered for {what}."
            )
    if settings["duplicates"] != "near":
        what = "near duplicates" if settings["duplicates"] == "images" else "duplicates"
        notes.append(f"The dataset may have {what}, which models memorize: --duplicates=near.")
    if not settings["languages"]:
        notes.append(
            "Captions of all languages were kept; languages of short captions are guesses."
        )
    if unknown := counts["unknown_license"]:
        notes.append(f"The license of {unknown:,} of {accepted:,} images is unknown.")
    return Section("Known risks", notes=notes)


def _ranked(counter: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(Counter(counter).items(), key=lambda pair: (-pair[1], pair[0]))


def line(cells: Iterable[str]) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
