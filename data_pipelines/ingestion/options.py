"""The flags of ingest and ingest_beam, and what records depend on."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Any

from absl import flags

from data_pipelines.ingestion.items import Columns
from data_pipelines.records import splits
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS
DUPLICATES = ("none", "images", "near")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything except the sources that a dataset depends on. The flags explain the fields."""

    resolution: int = 256
    min_size: int | None = None
    max_aspect_ratio: float = 3.0
    max_pixels: int = 2**28
    keep_animation: bool = False
    min_caption_length: int = 1
    max_caption_length: int = 0
    languages: tuple[str, ...] = ()
    max_watermark: float = 0.8
    max_unsafe: float = 0.5
    detect_unsafe: bool = False
    min_similarity: float = -1.0
    encoder: str = "byte-tiny"
    max_tokens: int = 192
    truncate_captions: bool = False
    duplicates: str = "images"
    near_distance: int = 4
    validation_fraction: float = 0.02
    shard_size: int = 4096
    seed: int = 0

    def __post_init__(self):
        if self.min_size is None:
            object.__setattr__(self, "min_size", self.resolution)

    @property
    def staging(self) -> dict[str, Any]:
        """The fields that decide what becomes of an item by itself."""
        fields = dataclasses.asdict(self)
        for later in ("near_distance", "validation_fraction", "shard_size"):
            del fields[later]
        fields["duplicates"] = self.duplicates == "near"  # whether to hash the images
        return fields


def define_flags() -> None:
    """Defines the flags shared by both commands."""
    flags.DEFINE_multi_string(
        "source",
        None,
        "What to read: PATH, or KIND:PATH with KIND one of webdataset, parquet, coco, folder, list "
        "(CSV, TSV, JSONL, JSON). The last part of a path may have * and ?, or {0000..0123}. "
        "Repeat the flag to join several sources.",
        required=True,
    )
    flags.DEFINE_string("data_dir", "data", "Directory of the datasets; created if missing.")
    flags.DEFINE_string("name", "folder", "Name of the dataset, config.data.task of a run.")
    flags.DEFINE_list(
        "caption_columns",
        [],
        "Columns (or JSON keys) of the captions. With several, each caption keeps the name of its "
        "column. Default: the first that a row has of caption, captions, text, TEXT, ...",
    )
    flags.DEFINE_string("image_column", "", "Column of the images or of their paths.")
    flags.DEFINE_string(
        "images", "", "Folder that the paths in a list start from (default: the list's folder)."
    )
    flags.DEFINE_bool(
        "allow_outside",
        False,
        "Follow paths and links that lead out of the folder of a list or a source; else skip them.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace an existing dataset once the new one is whole.")
    flags.DEFINE_bool(
        "skip_damaged", False, "Take what can be read of a damaged tar or Parquet file, and go on."
    )
    _define_image_flags()
    _define_caption_flags()
    flags.DEFINE_enum(
        "duplicates",
        "images",
        list(DUPLICATES),
        "Drop all but the first of equal images: images compares the bytes of the files; near also "
        "drops images whose perceptual hashes differ in at most --near_distance of 64 bits; none "
        "keeps all.",
    )
    flags.DEFINE_integer("near_distance", 4, "Distance of near duplicates, in bits.", 0, 16)
    flags.DEFINE_float(
        "validation_fraction",
        0.02,
        f"Share of images held out, but at least {splits.GRID} and at most half; 0 for none.",
        0,
        0.5,
    )
    flags.DEFINE_integer("shard_size", 4096, "Records in a file.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of the choice of held-out images.")


def _define_image_flags() -> None:
    flags.DEFINE_integer(
        "resolution",
        256,
        "Shorter side of the stored images in pixels, at least config.data.image_size (or "
        "config.model.image_size) of every model trained on them. Images keep their aspect ratio; "
        "training crops them. The default fits configs/folder.py and its :sr; for small images, 64 "
        "fits the base model.",
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
        "max_aspect_ratio", 3, "Skip images whose longer side is more times the other; 0: keep.", 0
    )
    flags.DEFINE_integer("max_pixels", 2**28, "Refuse to decode larger images.", 1)
    flags.DEFINE_bool(
        "keep_animation", False, "Take the first frame of animations and of pages; else skip them."
    )
    flags.DEFINE_float("max_watermark", 0.8, "Skip images with a higher pwatermark; 1: keep.", 0, 1)
    flags.DEFINE_float("max_unsafe", 0.5, "Skip images with a higher punsafe; 1: keep.", 0, 1)
    flags.DEFINE_bool(
        "detect_unsafe",
        False,
        "Score images without punsafe by nudenet, and skip them above --max_unsafe. The score is "
        "the highest confidence of an exposed intimate part. You install nudenet yourself; read "
        "about its license in docs/data.md first.",
    )
    flags.DEFINE_float("min_similarity", -1, "Skip pairs with a lower similarity; -1: keep.", -1, 1)


def _define_caption_flags() -> None:
    flags.DEFINE_integer("min_caption_length", 1, "Skip captions with fewer characters.", 1)
    flags.DEFINE_integer("max_caption_length", 0, "Skip captions with more; 0: no limit.", 0)
    flags.DEFINE_list(
        "languages", [], "Keep captions of these languages only, such as en,de (ISO 639-1)."
    )
    flags.DEFINE_string(
        "encoder",
        "byte-tiny",
        "Text encoder that embeds the captions once the records are written: the name of a bundled "
        "one, or a folder with its weights (docs/text.md). Empty: no embeddings; encode_text adds "
        "them later.",
    )
    flags.DEFINE_integer(
        "max_tokens",
        192,
        "Skip captions with more tokens of the encoder. A run's config.text.max_tokens must be at "
        "least as large.",
        1,
    )
    flags.DEFINE_bool(
        "truncate_captions",
        False,
        "Truncate captions longer than --max_tokens; otherwise skip them.",
    )


def from_flags() -> Options:
    """Returns the options that the flags set."""
    values = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Options)}
    return Options(**{**values, "languages": tuple(values["languages"])})


def columns_from_flags() -> Columns:
    """Returns the columns that the flags name."""
    captions = tuple(FLAGS.caption_columns)
    return Columns(captions, FLAGS.image_column, FLAGS.images, FLAGS.allow_outside)


def today() -> str:
    """Returns the date for the manifest; SOURCE_DATE_EPOCH sets it for reproducible builds."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch and not epoch.isdecimal():
        raise UserError(f"SOURCE_DATE_EPOCH is {epoch!r}; it must be seconds since 1970")
    utc = datetime.timezone.utc  # noqa: UP017
    now = datetime.datetime.fromtimestamp(int(epoch), utc) if epoch else datetime.datetime.now(utc)
    return now.date().isoformat()
