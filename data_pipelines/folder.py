r"""Prepares a folder of your own images and captions for training.

    python -m data_pipelines.folder --images=photos

Takes every jpg, png, webp and bmp below --images that has a caption: in a metadata.jsonl, a
captions.csv or a text file of the same name, in this order (records/captions.py has the formats).
A summary counts skipped files by reason; report.json beside the records lists each of them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from PIL import Image, ImageOps

from data_pipelines.records import captions, dataset, writing
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.common.pictures import to_rgb


def load_record(
    item: captions.Captioned, *, folder: str, resolution: int, min_size: int
) -> dict[str, Any] | dataset.Skip:
    """Makes a record of an image: upright, RGB on white, its center square at `resolution`."""
    name = item.file.encode("utf-8", errors="replace").decode()
    try:
        with Image.open(Path(folder) / item.file) as image:
            size = f"{image.width}x{image.height}"
            if min(image.size) < min_size:
                flag = "resolution" if min_size == resolution else "min_size"
                return dataset.Skip(name, f"smaller than --{flag}={min_size}", size)
            enlarged = min(image.size) < resolution
            lossy, upright = image.format == "JPEG", ImageOps.exif_transpose(image)
            image = square(to_rgb(upright), resolution)
    except Exception as e:  # a broken file makes decoders raise anything
        return dataset.Skip(name, "unreadable image", f"{type(e).__name__}: {e}")
    record = {
        "id": name,
        "image": _jpeg_bytes(image) if lossy else dataset.png_bytes(image),
        "caption": item.caption,
        "category": "",
        "scene": "",
    }
    if enlarged:
        record["change"] = dataset.Skip(name, f"enlarged to --resolution={resolution}", size)
    return record


def square(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes the center square to `resolution`, antialiased when it shrinks."""
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)


def _jpeg_bytes(image: Image.Image) -> bytes:
    """Encodes as JPEG, for images that were JPEGs: a third of a PNG's bytes, faster to decode."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def fit_captions(
    found: Sequence[captions.Captioned], encoder, truncate: bool
) -> tuple[list[captions.Captioned], list[dataset.Skip], list[dataset.Skip]]:
    """Truncates or skips captions that are too long for the encoder.

    Returns:
      The images whose captions fit, the skipped ones, and those with a truncated caption.
    """
    fitting, skipped, truncated = [], [], []
    for item in found:
        tokens = encoder.num_tokens(item.caption)
        if tokens <= encoder.max_tokens:
            fitting.append(item)
        elif truncate:
            truncated.append(dataset.Skip(item.file, "caption truncated", f"{tokens} tokens"))
            fitting.append(item._replace(caption=encoder.truncate(item.caption)))
        else:
            reason = f"caption longer than --max_tokens={encoder.max_tokens}"
            skipped.append(dataset.Skip(item.file, reason, f"{tokens} tokens"))
    return fitting, skipped, truncated


class Folder(dataset.RecordsBuilder):
    """Builds a dataset from a folder of captioned images; `hold_out` chooses the validation split.

    Args:
      min_size: images whose shorter side is less are skipped; None for `resolution`.

    Raises:
      UserError: the folder does not exist, or has no image with a usable caption.
    """

    def __init__(
        self,
        *,
        data_dir: str,
        images: str,
        encoder,
        resolution: int = 256,
        min_size: int | None = None,
        validation_fraction: float = 0.02,
        truncate_captions: bool = False,
        seed: int = 0,
    ):
        min_size = resolution if min_size is None else min_size
        found, skipped = captions.find(images)
        fitting, too_long, truncated = fit_captions(found, encoder, truncate_captions)
        skipped += too_long
        if not fitting:
            reasons = dataset.summary(skipped)
            raise UserError(f"--images={images} has no image with a usable caption: {reasons}")
        load = partial(load_record, folder=images, resolution=resolution, min_size=min_size)
        super().__init__(
            data_dir=data_dir,
            splits=partial(writing.hold_out, fitting, load, validation_fraction, seed),
            encoder=encoder,
            settings={
                "images": _fingerprint(images, fitting),
                "resolution": resolution,
                "min_size": min_size,
                "validation_fraction": validation_fraction,
                "seed": seed,
            },
            changed=truncated,
            skipped=skipped,
        )


def _fingerprint(folder: str, found: Sequence[captions.Captioned]) -> str:
    """Summarizes the names, sizes and captions of the images, to notice a changed folder."""
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
        "Side of the stored square images in pixels, at least config.data.image_size (or "
        "config.model.image_size) of every model trained on them. The default fits "
        "configs/folder.py and its :sr; for small images, 64 fits the base model.",
        1,
    )
    flags.DEFINE_integer(
        "min_size",
        None,
        "Skip images whose shorter side is less (default: --resolution). A lower value enlarges "
        "small images instead, which blurs them; the summary counts them.",
        1,
    )
    flags.DEFINE_float(
        "validation_fraction",
        0.02,
        f"Share of images held out, but at least {writing.GRID} and at most half; 0 for none.",
        0,
        0.5,
    )
    flags.DEFINE_bool(
        "truncate_captions",
        False,
        "Truncate captions longer than --max_tokens; otherwise skip them.",
    )
    flags.adopt_module_key_flags(writing)


def main(argv: list[str]) -> None:
    del argv
    captions.check_folder(flags.FLAGS.images)  # before the encoder is loaded
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
