"""Writes the records of a dataset, and finds a record by its index.

A record is an image, its caption, and the caption's embedding by a frozen text encoder. The
embedding is computed here, once, so training never runs the encoder. Each dataset is a tfds dataset
at <data_dir>/<name>[/<config>]/<version>. Beside its files are the byte offsets of all records, so
a record can be read by its index (see reading.tasks.RecordsSource): index i is the i-th candidate
that was not skipped.

This module imports neither SeqIO nor TensorFlow, so commands answer --help without them.
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
from data_pipelines.records import prepared
from imagen_jax.common.errors import UserError

REPORT = "report.json"  # beside the records: every changed or skipped candidate, with the reason
_OFFSETS = "offsets-{split}.npy"
_KEYS = "captions-{split}.npy"
SHARD = 2048  # candidates per file, and captions per call of the encoder


class Split(NamedTuple):
    """The candidates of a split, in order, and a function that makes a record of one.

    `load(item)` runs in threads. It returns a Skip, or a dict of

      id       the record's name
      image    PNG or JPEG bytes
      caption
      category of the caption; "" if none
      scene    JSON; "" if none
      change   optional: a Skip for the report that says how the image or caption was altered
    """

    items: Sequence[Any]
    load: Callable[[Any], dict[str, Any] | Skip]


def png_bytes(image: np.ndarray | Image.Image) -> bytes:
    """Encodes uint8 [H, W, 3] or an RGB image losslessly."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, "PNG")
    return buffer.getvalue()


class RecordsBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes records in the order of their candidates, in bounded memory.

    Args:
      data_dir: directory of the datasets.
      splits: returns the candidates of each split; called once, when writing starts.
      encoder: a TextEncoder; its identity is stored with the records.
      settings: JSON-able; everything else the records depend on. writing.prepare compares it.
      config: one of the class's BUILDER_CONFIGS, if it has any.
      changed, skipped: entries of the report from before the candidates are loaded.
    """

    VERSION = tfds.core.Version(prepared.VERSION)
    # There are no downloads. If tfds looks for checksums, it imports an undeclared dependency.
    url_infos: ClassVar[dict] = {}

    def __init__(
        self,
        *,
        data_dir: str,
        splits: Callable[[], Mapping[str, Split]],
        encoder,
        settings: Mapping[str, Any],
        config: str | None = None,
        changed: Sequence[Skip] = (),
        skipped: Sequence[Skip] = (),
    ):
        self._make_splits = splits
        self._encoder = encoder
        self._keys: dict[tuple[str, int], list[bytes]] = {}
        self.metadata = {"text_identity": dict(encoder.identity), "settings": dict(settings)}
        self.report = {"changed": list(changed), "skipped": list(skipped)}
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
                    # Little-endian bfloat16 [n, dim] as bytes: tfds has no ragged bfloat16, and
                    # bytes parse 100x faster than lists of floats.
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
        changes = [record.pop("change", None) for record in made]
        self.report["changed"] += [change for change in changes if change]
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
        self._splits = self._make_splits()
        total = sum(len(split.items) for split in self._splits.values())
        with tqdm(total=total, desc=self._name(), unit=" records", mininterval=0.5) as self._bar:
            super()._download_and_prepare(dl_manager, download_config)
        num_examples = {name: split.num_examples for name, split in self.info.splits.items()}
        if not num_examples.get("train"):
            reasons = summary(self.report["skipped"])
            raise UserError(f"no usable example for {self._name()}: {reasons}")
        entries = {what: [entry._asdict() for entry in self.report[what]] for what in self.report}
        report = {"records": num_examples, **entries}
        # data_path is a temporary folder here; tfds renames it once it is complete.
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
    """Finds where each record of TFRecord files starts: int64 [n, 2], file number and byte."""
    starts = []
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            while header := file.read(12):  # uint64 length of the data, uint32 checksum
                starts.append((number, file.tell() - len(header)))
                file.seek(struct.unpack("<Q", header[:8])[0] + 4, io.SEEK_CUR)
    return np.array(starts, np.int64).reshape(-1, 2)


def record_offsets(info: tfds.core.DatasetInfo, split: str) -> tuple[list[str], np.ndarray]:
    """Returns the files of a split, and as `_find_records` where its records start."""
    with (epath.Path(info.data_dir) / _OFFSETS.format(split=split)).open("rb") as file:
        return [str(path) for path in info.splits[split].filepaths], np.load(file)


def caption_keys(info: tfds.core.DatasetInfo, split: str) -> np.ndarray:
    """Returns common.caption_key of every caption in record order: S16 [n].

    Raises:
      UserError: the dataset was written by a version that stored no keys.
    """
    path = epath.Path(info.data_dir) / _KEYS.format(split=split)
    if not path.exists():
        raise UserError(f"{path} is missing: prepare this dataset again, with --overwrite")
    with path.open("rb") as file:
        return np.load(file)


def strings(info: tfds.core.DatasetInfo, split: str, feature: str) -> Iterator[str]:
    """Yields a feature, "caption" or "category", of every record in order."""
    from tensorflow.train import Example

    for path in info.splits[split].filepaths:
        with path.open("rb") as file:
            while header := file.read(12):
                example = Example.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
                file.seek(4, io.SEEK_CUR)
                yield example.features.feature[feature].bytes_list.value[0].decode()


def open_dataset(data_dir: str, name: str) -> tfds.core.DatasetBuilder:
    """Opens a prepared dataset ("scenes/32", "folder", "emoji") for reading.

    Raises:
      UserError: it does not exist; the message has the command that makes it.
    """
    return tfds.builder_from_directory(prepared.find(data_dir, name))
