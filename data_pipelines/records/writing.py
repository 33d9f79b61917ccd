"""Shared by the commands that write records: flags, held-out splits, and writing only once."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow_datasets as tfds
from absl import flags
from etils import epath

from data_pipelines.records import dataset, prepared, splits
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError


def define_flags() -> None:
    """Defines the flags shared by all commands that write records."""
    flags.DEFINE_string("data_dir", "data", "Directory of the datasets; created if missing.")
    flags.DEFINE_integer("seed", 0, "Seed of every random choice.")
    flags.DEFINE_string(
        "encoder",
        "byte-tiny",
        "Text encoder that embeds the captions: the name of a bundled one, or a folder with its "
        "weights (docs/text.md).",
    )
    flags.DEFINE_integer(
        "max_tokens",
        192,
        "Longest caption in tokens. A run's config.text.max_tokens must be at least as large.",
        1,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace an existing dataset once the new one is complete."
    )


def encoder_from_flags():
    """Loads the text encoder that --encoder and --max_tokens name."""
    from imagen_jax.text import load_encoder  # imports JAX, which --help does not need

    return load_encoder(flags.FLAGS.encoder, flags.FLAGS.max_tokens)


def hold_out(
    items: Sequence[tuple],
    load: Callable[[Any], dict[str, Any] | dataset.Skip],
    fraction: float,
    seed: int,
) -> dict[str, dataset.Split]:
    """Splits candidates into train and validation, each in the given order.

    Validation gets `fraction` of the candidates but at least splits.GRID, all of them usable: each
    is loaded before it is chosen. Candidates are tried in the order of a hash of the seed and their
    name, so adding a few candidates moves few. At most half of the candidates are tried; train gets
    the rest.

    Args:
      items: tuples that start with a name.
      load: as in dataset.Split.
      fraction: share to hold out; 0 holds out nothing.
    """
    ranked = sorted(items, key=lambda item: splits.rank(seed, item[0]))[: len(items) // 2]
    wanted = splits.wanted(len(items), fraction)
    held_out: set[tuple] = set()
    with ThreadPoolExecutor() as pool:
        while ranked and len(held_out) < wanted:
            missing = wanted - len(held_out)
            tried, ranked = ranked[:missing], ranked[missing:]
            loaded = zip(tried, pool.map(load, tried), strict=True)
            held_out.update(item for item, record in loaded if not isinstance(record, dataset.Skip))
    if len(held_out) < min(wanted, splits.GRID):
        print(splits.too_few(len(held_out), len(items)), file=sys.stderr)
    return {
        "train": dataset.Split([item for item in items if item not in held_out], load),
        "validation": dataset.Split([item for item in items if item in held_out], load),
    }


def prepare(builder: dataset.RecordsBuilder, *, overwrite: bool = False) -> epath.Path:
    """Writes the dataset, unless it already exists with the same settings.

    The dataset appears complete or not at all. If writing fails, the old dataset is kept.

    Returns:
      The folder of the records.

    Raises:
      UserError: a dataset with other settings exists and `overwrite` is not set, or no candidate
        was usable.
    """
    path = epath.Path(builder.data_path)
    if (path / prepared.INFO).exists() and not overwrite:
        # Not from builder.info.metadata, in which the builder's metadata replace the stored ones.
        stored, wanted = prepared.read_metadata(path), json.loads(json.dumps(builder.metadata))
        if differing := _differing(stored, wanted):
            raise UserError(
                f"{path} was prepared with {'; '.join(differing)}. Choose another --data_dir "
                "(in a config, data.dir), or --overwrite to replace it"
            )
        print(f"{path} is already prepared with these settings", file=sys.stderr)
        return path
    with cli.quiet_imports():
        import tensorflow  # noqa: F401 (tfds imports it; it reports missing accelerators)
    tfds.disable_progress_bar()
    with _set_aside(path), contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    _print_summary(builder, path)
    return path


def _print_summary(builder: dataset.RecordsBuilder, path: epath.Path) -> None:
    taken = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    size = sum(file.stat().length for file in path.iterdir()) / 2**20
    print(f"wrote {path}: {taken} ({size:.1f} MiB)", file=sys.stderr)
    for what in ("changed", "skipped"):
        if entries := builder.report[what]:
            print(f"{what} {len(entries)}: {dataset.summary(entries)}", file=sys.stderr)
    if builder.report["changed"] or builder.report["skipped"]:
        print(f"listed in {path / dataset.REPORT}", file=sys.stderr)


@contextlib.contextmanager
def _set_aside(path: epath.Path) -> Iterator[None]:
    """Renames `path` while it is rewritten, and renames it back if that fails."""
    old = path.with_name(path.name + ".replaced")
    if path.exists():
        path.rename(old)
    try:
        yield
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    if old.exists():
        old.rmtree()


def _differing(stored: Any, wanted: Any, key: str = "") -> list[str]:
    """Lists the leaves that differ, as "key=stored (now wanted)"."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(stored.keys() | wanted.keys())
        return [d for k in keys for d in _differing(stored.get(k), wanted.get(k), k)]
    return [] if stored == wanted else [f"{key}={stored} (now {wanted})"]
