"""What the commands that write records share: flags, held-out splits, and preparing just once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import flags
from etils import epath

from data_pipelines.records import dataset
from imagen_jax.common.errors import UserError


def define_flags() -> None:
    """Defines the flags that every command line writing records has."""
    flags.DEFINE_string("data_dir", "data", "Folder that the datasets are written to.")
    flags.DEFINE_integer("seed", 0, "What is drawn at random depends on this alone.")
    flags.DEFINE_string(
        "encoder", "byte-tiny", "Text encoder: a bundled one's name, or a folder with its weights."
    )
    flags.DEFINE_integer("max_tokens", 192, "The longest caption, in tokens, that is encoded.", 1)
    flags.DEFINE_bool(
        "overwrite", False, "Replace the dataset that is there, once this is complete."
    )


def encoder_from_flags():
    """The text encoder that --encoder and --max_tokens ask for."""
    from imagen_jax.text import load_encoder  # imports JAX, which --help does not need

    return load_encoder(flags.FLAGS.encoder, flags.FLAGS.max_tokens)


def hold_out(items: Sequence[tuple], fraction: float, seed: int) -> tuple[list[tuple], list[tuple]]:
    """Splits tuples that start with a name into (train, validation), keeping their order.

    Those whose names have the lowest hashes are held out, so that adding some moves few. Of two or
    more there is at least one in each, unless the fraction is 0.
    """
    ranked = sorted(
        items, key=lambda item: hashlib.sha256(ascii((seed, item[0])).encode()).digest()
    )
    count = max(round(len(items) * fraction), int(fraction > 0 and len(items) > 1))
    held_out = set(ranked[:count])
    train = [item for item in items if item not in held_out]
    return train, [item for item in items if item in held_out]


def prepare(builder: dataset.RecordsBuilder, *, overwrite: bool = False) -> epath.Path:
    """Writes the dataset, or finds it already written with the same settings.

    Nothing half-written is ever found at the dataset's place, and a dataset that is to be replaced
    stays until its replacement is complete.

    Returns:
      The folder of the records.

    Raises:
      UserError: a dataset with other settings is there and not `overwrite`, or nothing was usable.
    """
    path = epath.Path(builder.data_path)
    if (path / dataset.INFO).exists() and not overwrite:
        differing = _differing(_stored_metadata(path), json.loads(json.dumps(builder.metadata)))
        if differing:
            raise UserError(
                f"{path} was prepared with {'; '.join(differing)}. Choose another --data_dir "
                "(in a config, data.dir), or --overwrite to replace it"
            )
        print(f"{path} is already prepared with these settings", file=sys.stderr)
        return path
    tfds.disable_progress_bar()
    with _set_aside(path), contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    _print_summary(builder, path)
    return path


def _print_summary(builder: dataset.RecordsBuilder, path: epath.Path) -> None:
    taken = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    size = sum(file.stat().length for file in path.iterdir()) / 2**20
    print(f"wrote {path}: {taken} ({size:.1f} MiB)", file=sys.stderr)
    if skipped := builder.report["skipped"]:
        reasons = dataset.summary(skipped)
        print(
            f"skipped {len(skipped)}: {reasons}; listed in {path / dataset.REPORT}", file=sys.stderr
        )


@contextlib.contextmanager
def _set_aside(path: epath.Path) -> Iterator[None]:
    """Moves what is at `path` away while it is rewritten; back if that fails."""
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


def _stored_metadata(path: epath.Path) -> dict[str, Any]:
    # Not builder.info.metadata: tfds lets what the code says win over what was stored.
    return json.loads((path / "metadata.json").read_text())


def _differing(stored: Any, wanted: Any, key: str = "") -> list[str]:
    """The leaves that differ, as "key=stored (now wanted)"."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(stored.keys() | wanted.keys())
        return [d for k in keys for d in _differing(stored.get(k), wanted.get(k), k)]
    return [] if stored == wanted else [f"{key}={stored} (now {wanted})"]
