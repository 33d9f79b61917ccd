"""The records that every dataset of this project is made of, how they are written, and found again.

A record is an image, its caption, and the caption's embedding by a frozen text encoder, computed
once here so that training never runs the encoder. Each dataset is a tfds builder whose files are at
<data_dir>/<name>[/<config>]/<version>, and tfds reads it as it reads any other. Next to the files
lies where in them each record starts, so that a record can be read by its index: index i is the
i-th candidate that was not skipped (see tasks.RecordsSource).

SeqIO and TensorFlow are not imported here: command lines answer --help without them.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tqdm import tqdm

from data_pipelines.common import Skip, caption_key, summary
from imagen_jax.common.errors import UserError

VERSION = "1.0.0"
REPORT = "report.json"  # next to the records: what was taken, and each thing skipped
INFO = "dataset_info.json"  # what tfds writes last
_OFFSETS = "offsets-{split}.npy"
_KEYS = "captions-{split}.npy"
SHARD = 2048  # candidates per file, and captions per call of the encoder

_COMMANDS = {
    "scenes": "python -m data_pipelines.scenes --data_dir={data_dir} --resolution={config}",
    "folder": "python -m data_pipelines.folder --data_dir={data_dir} --images=FOLDER",
    "emoji": "python -m data_pipelines.emoji --data_dir={data_dir}",
}


class Split(NamedTuple):
    """The candidates of a split, in order, and what makes a record of one.

    `load(item)` returns a Skip or a dict of id, image (PNG or JPEG bytes), caption, category (""
    if none) and scene (JSON, "" if none). It runs in threads.
    """

    items: Sequence[Any]
    load: Callable[[Any], dict[str, Any] | Skip]


class DatasetInfo(NamedTuple):
    """What a reader needs to know of a prepared dataset."""

    num_examples: dict[str, int]
    text_identity: dict[str, Any]


def png_bytes(image: np.ndarray | Image.Image) -> bytes:
    """Encodes uint8 [H, W, 3] or an RGB image, without loss."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, "PNG")
    return buffer.getvalue()


class RecordsBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes records in the order of their candidates, in bounded memory.

    Args:
      data_dir: where datasets live.
      splits: the candidates by the split's name.
      encoder: a TextEncoder; its identity is stored with the records.
      settings: JSON-able, all else that the records depend on; what writing.prepare compares.
      config: which of the class's BUILDER_CONFIGS, if it has any.
      report: JSON-able, what was decided before the candidates were read; "skipped" lists Skips.
    """

    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded; looking for checksums, tfds imports a package that it does not require.
    url_infos: ClassVar[dict] = {}

    def __init__(
        self,
        *,
        data_dir: str,
        splits: Mapping[str, Split],
        encoder,
        settings: Mapping[str, Any],
        config: str | None = None,
        report: Mapping[str, Any] | None = None,
    ):
        self._splits = splits
        self._encoder = encoder
        self._keys: dict[tuple[str, int], list[bytes]] = {}
        self.metadata = {"text_identity": dict(encoder.identity), "settings": dict(settings)}
        self.report = {"skipped": [], **(report or {})}
        super().__init__(data_dir=data_dir, config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images, captions and the captions' embeddings by a frozen text encoder.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "caption": tfds.features.Text(),
                    "category": tfds.features.Text(),
                    "scene": tfds.features.Text(),
                    # Little-endian bfloat16 [n, dim]: tfds has no ragged bfloat16, and raw bytes
                    # parse 100x faster than lists of floats.
                    "text_embeddings": tfds.features.Text(),
                    "text_tokens": np.int32,
                }
            ),
            metadata=tfds.core.MetadataDict(self.metadata),
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        return {
            name: [
                lambda name=name, start=start: self._shard(name, start)
                for start in range(0, len(split.items), SHARD)
            ]
            for name, split in self._splits.items()
            if split.items
        }

    def _shard(self, name: str, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        split = self._splits[name]
        with ThreadPoolExecutor() as pool:
            loaded = list(pool.map(split.load, split.items[start : start + SHARD]))
        self.report["skipped"] += [record for record in loaded if isinstance(record, Skip)]
        made = [record for record in loaded if not isinstance(record, Skip)]
        self._bar.update(len(loaded) - len(made))
        self._keys[name, start] = [caption_key(record["caption"]) for record in made]
        embeddings = self._encoder.encode(
            [record["caption"] for record in made],
            progress=lambda done, total: self._bar.set_postfix_str(
                f"encoding {done}/{total}", refresh=False
            ),
        )
        self._bar.set_postfix_str("")
        for i, (record, embedding) in enumerate(zip(made, embeddings, strict=True)):
            yield (
                start + i,
                {
                    **record,
                    "text_embeddings": embedding.tobytes(),
                    "text_tokens": len(embedding),
                },
            )
            self._bar.update()

    def _download_and_prepare(self, dl_manager, download_config=None):
        total = sum(len(split.items) for split in self._splits.values())
        with tqdm(total=total, desc=self._name(), unit=" records", mininterval=0.5) as self._bar:
            super()._download_and_prepare(dl_manager, download_config)
        num_examples = {name: split.num_examples for name, split in self.info.splits.items()}
        if not num_examples.get("train"):
            reasons = summary(self.report["skipped"])
            raise UserError(f"no usable example for {self._name()}: {reasons}")
        report = {"records": num_examples, **self.report}
        report["skipped"] = [skip._asdict() for skip in report["skipped"]]
        # data_path is tfds' unfinished folder here: all that is in it appears at once, complete.
        (self.data_path / REPORT).write_text(json.dumps(report, indent=1))
        for name, split in self.info.splits.items():
            with (self.data_path / _OFFSETS.format(split=name)).open("wb") as file:
                np.save(file, _find_records(split.filepaths))
            keys = [key for at in sorted(self._keys) if at[0] == name for key in self._keys[at]]
            with (self.data_path / _KEYS.format(split=name)).open("wb") as file:
                np.save(file, np.array(keys, "S16"))

    def _name(self) -> str:
        return "/".join(filter(None, (self.name, self.builder_config and self.builder_config.name)))


def _find_records(paths: Sequence[epath.Path]) -> np.ndarray:
    """Where each record of TFRecord files starts: int64 [n, 2], the file's number and the byte."""
    starts = []
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            while header := file.read(12):  # uint64 length of the data, uint32 checksum
                starts.append((number, file.tell() - len(header)))
                file.seek(struct.unpack("<Q", header[:8])[0] + 4, io.SEEK_CUR)
    return np.array(starts, np.int64).reshape(-1, 2)


def record_offsets(info: tfds.core.DatasetInfo, split: str) -> tuple[list[str], np.ndarray]:
    """The files of a split; and for each record, int64 [n, 2], the file's number and its byte."""
    with (epath.Path(info.data_dir) / _OFFSETS.format(split=split)).open("rb") as file:
        return [str(path) for path in info.splits[split].filepaths], np.load(file)


def caption_keys(info: tfds.core.DatasetInfo, split: str) -> np.ndarray:
    """The keys of a split's captions in the order of its records, S16 [n]; see embeddings.

    Raises:
      UserError: the dataset is older than such keys.
    """
    path = epath.Path(info.data_dir) / _KEYS.format(split=split)
    if not path.exists():
        raise UserError(f"{path} is missing: prepare this dataset again, with --overwrite")
    with path.open("rb") as file:
        return np.load(file)


def strings(info: tfds.core.DatasetInfo, split: str, feature: str) -> Iterator[str]:
    """A feature of a split, "caption" or "category", in the order of its records."""
    from tensorflow.train import Example

    for path in info.splits[split].filepaths:
        with path.open("rb") as file:
            while header := file.read(12):
                example = Example.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
                file.seek(4, io.SEEK_CUR)
                yield example.features.feature[feature].bytes_list.value[0].decode()


def open_dataset(data_dir: str, name: str) -> tfds.core.DatasetBuilder:
    """The prepared dataset `name` ("scenes/32", "folder", "emoji") as a tfds builder for reading.

    Raises:
      UserError: it is not there; the message has the command that makes it.
    """
    path = epath.Path(data_dir) / name / VERSION
    if not (path / INFO).exists():
        dataset, _, config = name.partition("/")
        command = _COMMANDS[dataset].format(data_dir=data_dir, config=config)
        raise UserError(f"data.dir={data_dir} holds no dataset {name!r}; make it with: {command}")
    return tfds.builder_from_directory(path)


def dataset_info(data_dir: str, name: str) -> DatasetInfo:
    """The sizes of a prepared dataset's splits and the identity of the encoder of its captions.

    Raises:
      UserError: it is not there; the message has the command that makes it.
    """
    info = open_dataset(data_dir, name).info
    num_examples = {split: s.num_examples for split, s in info.splits.items()}
    return DatasetInfo(num_examples, info.metadata["text_identity"])
