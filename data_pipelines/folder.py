r"""Makes records of your own images and captions.

    python -m data_pipelines.folder --images=photos --data_dir=data

Takes every jpg, png, webp and bmp below --images that has a caption: in a metadata.jsonl, else in
a captions.csv, else in a text file of the same name (see records/captions.py for the formats).
What was skipped, and why, is summed up at the end and listed in full next to the records.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageOps

from data_pipelines.records import captions, dataset, writing
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError


def load_record(
    item: captions.Captioned, *, folder: str, resolution: int, min_size: int
) -> dict[str, Any] | dataset.Skip:
    """One captioned image as a record: upright, on white, RGB, its center square resized."""
    name = item.file.encode("utf-8", errors="replace").decode()
    try:
        with Image.open(Path(folder) / item.file) as image:
            if min(image.size) < min_size:
                detail = f"{image.width}x{image.height}"
                return dataset.Skip(name, f"smaller than --min_size={min_size}", detail)
            lossy, upright = image.format == "JPEG", ImageOps.exif_transpose(image)
            image = square(to_rgb(upright), resolution)
    except Exception as e:  # a broken file makes decoders raise anything
        return dataset.Skip(name, "unreadable image", f"{type(e).__name__}: {e}")
    return {
        "id": name,
        "image": _jpeg_bytes(image) if lossy else dataset.png_bytes(image),
        "caption": item.caption,
        "category": "",
        "scene": "",
    }


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency becomes white, 16-bit gray loses its low byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The center square at the resolution; antialiased where it shrinks."""
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)


def _jpeg_bytes(image: Image.Image) -> bytes:
    """For images that were JPEG anyway: a third of the bytes, and faster to decode."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def fit_captions(
    found: Sequence[captions.Captioned], encoder, truncate: bool
) -> tuple[list[captions.Captioned], list[dataset.Skip], list[str]]:
    """The images whose captions the encoder takes, the others, and the names of those cut short."""
    fitting, skipped, truncated = [], [], []
    for item in found:
        tokens = encoder.num_tokens(item.caption)
        if tokens <= encoder.max_tokens:
            fitting.append(item)
        elif truncate:
            truncated.append(item.file)
            fitting.append(item._replace(caption=_truncate(item.caption, encoder)))
        else:
            reason = f"caption longer than {encoder.max_tokens} tokens"
            skipped.append(dataset.Skip(item.file, reason, f"{tokens} tokens"))
    return fitting, skipped, truncated


def _truncate(caption: str, encoder) -> str:
    """The longest beginning that fits, of whole words unless the first alone is too long."""
    length, end = 0, len(caption)  # caption[:length] fits, caption[:end] does not
    while end - length > 1:
        middle = (length + end) // 2
        if encoder.num_tokens(caption[:middle]) <= encoder.max_tokens:
            length = middle
        else:
            end = middle
    words = caption[: length + 1].rpartition(" ")[0]
    return words or caption[:length]


class Folder(dataset.RecordsBuilder):
    """The captioned images of a folder; validation images are drawn by their names and the seed."""

    def __init__(
        self,
        *,
        data_dir: str,
        images: str,
        encoder,
        resolution: int = 256,
        min_size: int = 64,
        validation_fraction: float = 0.02,
        truncate_captions: bool = False,
        seed: int = 0,
    ):
        found, skipped = captions.find(images)
        fitting, too_long, truncated = fit_captions(found, encoder, truncate_captions)
        report = {"skipped": skipped + too_long, "truncated_captions": truncated}
        if not fitting:
            reasons = dataset.summary(report["skipped"])
            raise UserError(f"--images={images} holds no image with a usable caption: {reasons}")
        load = partial(load_record, folder=images, resolution=resolution, min_size=min_size)
        train, validation = writing.hold_out(fitting, validation_fraction, seed)
        super().__init__(
            data_dir=data_dir,
            splits={
                "train": dataset.Split(train, load),
                "validation": dataset.Split(validation, load),
            },
            encoder=encoder,
            settings={
                "images": _fingerprint(images, fitting),
                "resolution": resolution,
                "min_size": min_size,
                "validation_fraction": validation_fraction,
                "seed": seed,
            },
            report=report,
        )


def _fingerprint(folder: str, found: Sequence[captions.Captioned]) -> str:
    """Changes with the names, sizes and captions of the images."""
    digest = hashlib.sha256()
    for item in found:
        entry = (item.file, (Path(folder) / item.file).stat().st_size, item.caption)
        digest.update(ascii(entry).encode())
    return f"{len(found)} images {digest.hexdigest()[:8]}"


def define_flags() -> None:
    flags.DEFINE_string("images", None, "Folder of images and captions.", required=True)
    flags.DEFINE_integer(
        "resolution",
        256,
        "Records are squares of this size, cut from the center of an image and resized so that its "
        "short side fits: at least what the largest model trained on them draws.",
        1,
    )
    flags.DEFINE_integer(
        "min_size", 64, "Images whose short side is less are skipped; others are enlarged.", 1
    )
    flags.DEFINE_float("validation_fraction", 0.02, "Share of images held out.", 0, 0.5)
    flags.DEFINE_bool(
        "truncate_captions", False, "Cut captions longer than --max_tokens instead of skipping."
    )
    flags.adopt_module_key_flags(writing)


def main(argv: list[str]) -> None:
    del argv
    options = ("data_dir", "images", "resolution", "min_size", "validation_fraction", "seed")
    builder = Folder(
        **{name: flags.FLAGS[name].value for name in (*options, "truncate_captions")},
        encoder=writing.encoder_from_flags(),
    )
    writing.prepare(builder, overwrite=flags.FLAGS.overwrite)


if __name__ == "__main__":
    writing.define_flags()
    define_flags()
    cli.run(main)
