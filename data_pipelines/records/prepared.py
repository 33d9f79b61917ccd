"""Finds prepared datasets and reads their metadata: only JSON, without TensorFlow or tfds."""

from __future__ import annotations

import json
import shlex
from typing import Any, NamedTuple

from etils import epath

from imagen_jax.common.errors import UserError

VERSION = "1.0.0"
INFO = "dataset_info.json"  # tfds writes it last, so a dataset without it does not exist
METADATA = "metadata.json"


class DatasetInfo(NamedTuple):
    """The metadata of a prepared dataset.

    Attributes:
      num_examples: records in each split.
      text_identity: the identity of the encoder that embedded the captions.
      settings: everything else the records depend on, as passed to RecordsBuilder.
    """

    num_examples: dict[str, int]
    text_identity: dict[str, Any]
    settings: dict[str, Any]


def find(data_dir: str, name: str, **flags: Any) -> epath.Path:
    """Returns the folder of the dataset `name` ("scenes/32", "folder", "emoji").

    Args:
      flags: flags of the command that the error message suggests.

    Raises:
      UserError: the dataset does not exist; the message has the command that makes it.
    """
    path = epath.Path(data_dir) / name / VERSION
    if not (path / INFO).exists():
        command = make_command(data_dir, name, **flags)
        encoders = " (docs/text.md says what --encoder takes)" if "encoder" in flags else ""
        raise UserError(
            f"data.dir={data_dir} has no dataset {name!r}; make it with: {command}{encoders}"
        )
    return path


def make_command(data_dir: str, name: str, **flags: Any) -> str:
    """Returns the command that prepares a dataset."""
    module, _, resolution = name.partition("/")
    flags = {"data_dir": data_dir} | ({"resolution": resolution} if resolution else {}) | flags
    if module == "folder":
        flags = {"images": "FOLDER", **flags}
    words = [f"--{flag}={shlex.quote(str(value))}" for flag, value in flags.items()]
    return " ".join([f"python -m data_pipelines.{module}", *words])


def dataset_info(data_dir: str, name: str, **flags: Any) -> DatasetInfo:
    """Reads the metadata of a prepared dataset.

    Raises:
      UserError: see `find`.
    """
    path = find(data_dir, name, **flags)
    splits = json.loads((path / INFO).read_text())["splits"]
    num_examples = {s["name"]: sum(map(int, s["shardLengths"])) for s in splits}
    return DatasetInfo(num_examples, **read_metadata(path))


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """Reads the text_identity and settings stored with the records in `path`."""
    return json.loads((path / METADATA).read_text())
