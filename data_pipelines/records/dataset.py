"""Writes the records of a dataset.

A record is an image, its caption, and the caption's embedding by a frozen text encoder. The
embedding is computed once, so training never runs the encoder: RecordsBuilder stores it in the
record, ingest in a store beside the records. Each dataset is a tfds dataset
at <data_dir>/<name>[/<config>]/<version>. Beside each file are the byte offsets of its records, so
a record can be read by its index (see records.source): index i is the i-th candidate that was not
skipped.

This module imports neither SeqIO nor TensorFlow, so commands answer --help without them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tqdm import tqdm

from data_pipelines.common import Skip, summary
from data_pipelines.records import prepared
from data_pipelines.records.record_files import write_offsets
from imagen_jax.common.errors import UserError

REPORT = "report.json"  # beside the records: every changed or skipped candidate, with the reason
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


def features(
    *, embedded: bool = False, several: bool = False, named: bool = False
) -> tfds.features.FeaturesDict:
    """Returns the features of a record.

    Args:
      embedded: the records hold the embeddings of their captions.
      several: an image has several `captions`; the first is its `caption`.
      named: its captions have `caption_sources`, the columns or models that they come from.
    """
    text = tfds.features.Text
    found = {"id": text(), "image": tfds.features.Image(shape=(None, None, 3)), "caption": text()}
    found |= {"category": text(), "scene": text()}
    if several:
        found["captions"] = tfds.features.Sequence(text())
    if named:
        found["caption_sources"] = tfds.features.Sequence(text())
    if embedded:
        # Little-endian bfloat16 [n, dim] as bytes: tfds has no ragged bfloat16, and bytes parse
        # 100x faster than lists of floats.
        found |= {"text_embeddings": text(), "text_tokens": tfds.features.Scalar(np.int32)}
    return tfds.features.FeaturesDict(found)


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
        self.metadata = {"text_identity": dict(encoder.identity), "settings": dict(settings)}
        self.report = {"changed": list(changed), "skipped": list(skipped)}
        super().__init__(data_dir=data_dir, config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images, captions and the captions' embeddings by a frozen text encoder.",
            features=features(embedded=True),
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
        for split in self.info.splits.values():
            for path in split.filepaths:
                write_offsets(str(path))

    def _name(self) -> str:
        return "/".join(filter(None, (self.name, self.builder_config and self.builder_config.name)))


def write_tfds_metadata(
    folder: epath.Path,
    name: str,
    features: tfds.features.FeaturesDict,
    splits: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes dataset_info.json and features.json, so that tfds can read the files in `folder`.

    Args:
      splits: {split: {"bytes": ..., "shards": [{"records": ...}, ...]}}.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix="tfrecord"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["records"] for shard in fields["shards"]],
            num_bytes=fields["bytes"],
            filename_template=template.replace(split=split),
        )
        for split, fields in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=prepared.VERSION,
        filename_template=template,
        check_data=False,
        description="Images and captions.",
    )
