"""Finds prepared datasets and reads their metadata: only JSON, without TensorFlow or tfds."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError, first_line

VERSION = "1.0.0"
INFO = "dataset_info.json"  # tfds writes it last, so a dataset without it does not exist
METADATA = "metadata.json"
FEATURES = "features.json"  # the schema, by tfds
MANIFEST = "manifest.json"
WORK = ".ingest"  # below a dataset's folder while ingest runs, and after an interruption
COMMANDS = ("scenes", "emoji")  # write the datasets of their names; ingest writes all others
STORE = "embeddings"  # the store of embeddings that ingest writes below a dataset's folder
# Names of the files of a dataset, as tfds and this project write them; others could be any path.
_NAME = r"[\w.-]+"
_TEMPLATE = re.compile(
    r"([\w.-]|\{(DATASET|SPLIT|FILEFORMAT|SHARD_X_OF_Y|SHARD_INDEX|NUM_SHARDS)\})+"
)
_MOST = 2**40  # records of a file
TARS = "tars.json"  # names the tars of a dataset that data_pipelines.index_tars has indexed


class DatasetInfo(NamedTuple):
    """The metadata of a prepared dataset.

    Attributes:
      num_examples: records in each split.
      text_identity: the identity of the encoder that embedded the captions; None if the records
        have no embeddings.
      settings: everything else the records depend on, as passed to RecordsBuilder.
    """

    num_examples: dict[str, int]
    text_identity: dict[str, Any] | None
    settings: dict[str, Any]


def exists(data_dir: str, name: str) -> bool:
    """Returns whether `data_dir` has a complete dataset `name`."""
    buckets.check(data_dir)
    folder = epath.Path(data_dir) / name
    return (folder / VERSION / INFO).exists() or (folder / TARS).exists()


def find(data_dir: str, name: str, **flags: Any) -> epath.Path:
    """Returns the folder of the dataset `name` ("scenes/32", "folder"), or its TARS file.

    Args:
      flags: flags of the command that the error message suggests.

    Raises:
      UserError: the dataset does not exist; the message has the command that makes it.
    """
    buckets.check(data_dir)
    path = epath.Path(data_dir) / name / VERSION
    unfinished = (path / WORK).exists() and not (path / MANIFEST).exists()
    if unfinished:
        raise UserError(
            f"data.dir={data_dir}: the dataset {name!r} is unfinished; run the command that makes "
            "it again to add the rest"
        )
    if (path / INFO).exists():
        return path
    if (path.parent / TARS).exists():
        return path.parent / TARS
    command = make_command(data_dir, name, **flags)
    encoders = " (docs/text.md says what --encoder takes)" if "encoder" in flags else ""
    raise UserError(
        f"data.dir={data_dir} has no dataset {name!r}; make it with: {command}{encoders}"
    )


def make_command(data_dir: str, name: str, **flags: Any) -> str:
    """Returns the command that prepares a dataset."""
    module, _, resolution = name.partition("/")
    flags = {"data_dir": data_dir} | ({"resolution": resolution} if resolution else {}) | flags
    if module not in COMMANDS:
        module, flags = "ingest", {"source": "FOLDER", "name": module, **flags}
    words = [f"--{flag}={shlex.quote(str(value))}" for flag, value in flags.items()]
    return " ".join([f"python -m data_pipelines.{module}", *words])


def dataset_info(data_dir: str, name: str, **flags: Any) -> DatasetInfo:
    """Reads the metadata of a prepared dataset.

    Raises:
      UserError: see `find`.
    """
    path = find(data_dir, name, **flags)
    if path.name == TARS:
        with reading(path):
            return DatasetInfo(_checked_counts(_object(path)["splits"]), None, {})
    with reading(path / INFO):
        splits = _object(path / INFO)["splits"]
        num_examples = {s["name"]: sum(_lengths(s)) for s in splits}
    metadata = read_metadata(path)
    return DatasetInfo(num_examples, metadata.get("text_identity"), metadata.get("settings") or {})


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """Reads the text_identity and settings stored with the records in `path`."""
    with reading(path / METADATA):
        metadata = _object(path / METADATA)
        for key in ("text_identity", "settings"):
            if not isinstance(metadata.get(key) or {}, dict):
                raise ValueError(f"{key} is no object")
        return metadata


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Turns what a damaged file of metadata raises into a UserError that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        problem = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{path}: damaged ({problem:.200}); prepare the dataset again") from e


def _object(path: epath.Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _checked_counts(counts: dict[str, Any]) -> dict[str, int]:
    for count in counts.values():
        if type(count) is not int or not 0 <= count < _MOST:
            raise ValueError(f"a count is {count!r:.100}")
    return counts


def _lengths(split: dict[str, Any]) -> list[int]:
    """Returns the number of records of each file of a split."""
    lengths = [int(n) for n in split.get("shardLengths", [])]
    if not all(0 <= n < _MOST for n in lengths) or len(lengths) >= 2**21:
        raise ValueError("shardLengths are out of range")
    return lengths


def caption_sources(data_dir: str, name: str) -> dict[str, int] | None:
    """Returns the names of a dataset's captions with their counts, {} if they have no names.

    None means unknown: the dataset has names, but was not written by this version of ingest.
    """
    folder = find(data_dir, name)
    if folder.name == TARS:
        return {}
    if (folder / MANIFEST).exists():
        captions = json.loads((folder / MANIFEST).read_text())["captions"]
        if "sources" in captions:
            return captions["sources"]
    features = folder / FEATURES
    return None if not features.exists() or "caption_sources" in features.read_text() else {}


def own_store(data_dir: str, name: str) -> tuple[str, ...]:
    """Returns the path of the store of embeddings beside the records, () if there is none."""
    path = epath.Path(data_dir) / name / VERSION / STORE
    return (str(path),) if path.exists() else ()


def split_files(path: epath.Path, split: str) -> tuple[Callable[[int], str], list[int]]:
    """Returns a function from file number to path, and the number of records of each file.

    tfds would build a list of all paths.

    Args:
      path: the dataset's folder, from `find`.
    """
    with reading(path / INFO):
        info = _object(path / INFO)
        (found,) = (s for s in info["splits"] if s["name"] == split)
        lengths = _lengths(found)
        template = found.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        names = (split, info["name"], info.get("fileFormat", "tfrecord"))
        plain = all(re.fullmatch(_NAME, name) for name in names)
        if not plain or not _TEMPLATE.fullmatch(template):
            raise ValueError("names of files are not valid")

    def path_of(file: int) -> str:
        name = template.format(
            DATASET=info["name"],
            SPLIT=split,
            FILEFORMAT=info.get("fileFormat", "tfrecord"),
            SHARD_X_OF_Y=f"{file:05d}-of-{len(lengths):05d}",
            SHARD_INDEX=f"{file:05d}",
            NUM_SHARDS=f"{len(lengths):05d}",
        )
        return f"{path}/{name}"

    return path_of, lengths
