"""Readers of datasets, of stores of embeddings, and of sources of captioned images."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from hypothesis import strategies as st

from .damage import EXTREMES, Bytes, Target, damaged, damaged_json, json_bytes


def _example(**changes: Any) -> bytes:
    import datasets

    parts = {k: changes.pop(k) for k in ("captions", "embedded") if k in changes}
    fields = datasets.record(1, image=datasets.picture(1, 2), **parts)
    return datasets.example(fields | changes)


def records() -> Target:
    from data_pipelines.records import tfrecord
    from data_pipelines.records.record_files import RecordFiles
    from data_pipelines.records.source import Bad, Record

    examples = [
        _example(),
        _example(captions=["a", "b"], embedded=False),
        _example(image=[]),
        _example(text_embeddings=[]),
        _example(text_tokens=-1),
        _example(caption=7),
    ]
    framed = st.lists(
        st.one_of(st.sampled_from(examples), damaged(examples)).map(tfrecord.frame), max_size=3
    ).map(b"".join)
    good = b"".join(map(tfrecord.frame, examples))

    def read(data: bytes, folder: Path) -> None:
        path = folder / "x.tfrecord"
        path.write_bytes(data)
        source = RecordFiles(lambda file: str(path), [4])
        for found in source.read(0, 4):
            assert isinstance(found, (Record, Bad))
            if isinstance(found, Record):
                with contextlib.suppress(Bad):
                    found.embedded()
        with path.open("rb") as file:
            for frame in tfrecord.read_frames(file, "x"):
                tfrecord.data_of(frame)

    return Target(st.one_of(damaged([good]), framed), read)


def offsets() -> Target:
    from data_pipelines.records import tfrecord
    from data_pipelines.records.record_files import RecordFiles, find_records
    from data_pipelines.records.source import Bad

    data = b"".join([tfrecord.frame(_example())] * 3)
    buffer = io.BytesIO()

    def read(offsets: bytes, folder: Path) -> None:
        path = folder / "x.tfrecord"
        path.write_bytes(data)
        (folder / "x.tfrecord.offsets.npy").write_bytes(offsets)
        for found in RecordFiles(lambda file: str(path), [3]).read(0, 3):
            assert isinstance(found, Bad) or found.captions == ("r 1",)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        np.save(buffer, find_records(str(path)))
    numbers = st.lists(st.sampled_from([*range(-2, 3), *EXTREMES[:8]]), max_size=6)

    def saved(values: list[int]) -> bytes:
        out = io.BytesIO()
        np.save(out, np.array(values, np.int64))
        return out.getvalue()

    return Target(st.one_of(damaged([buffer.getvalue()]), numbers.map(saved)), read)


def dataset() -> Target:
    from data_pipelines.records import prepared
    from data_pipelines.records.opening import open_split

    splits = [{"name": "train", "shardLengths": ["1"], "filepathTemplate": "{SHARD_X_OF_Y}.x"}]
    info = {"name": "x", "fileFormat": "tfrecord", "splits": splits}
    metadata = {"text_identity": {"encoder": "byte-tiny", "dim": 8}, "settings": {"a": 1}}

    def read(files: tuple[bytes, bytes], folder: Path) -> None:
        place = folder / "x" / prepared.VERSION
        place.mkdir(parents=True, exist_ok=True)
        (place / prepared.INFO).write_bytes(files[0])
        (place / prepared.METADATA).write_bytes(files[1])
        prepared.dataset_info(str(folder), "x")
        source = open_split(str(folder), "x", "train")
        source.read(0, min(2, len(source)))

    whole = [st.just(json.dumps(x).encode()) for x in (info, metadata)]
    pairs = [
        st.tuples(json_bytes(info), whole[1]),
        st.tuples(whole[0], json_bytes(metadata)),
    ]
    return Target(st.one_of(pairs), read)


def manifest() -> Target:
    from data_pipelines.records import manifest

    shards = [{"file": "x.tfrecord", "bytes": 3, "sha256": "00"}]
    fields = {"name": "x", "splits": {"train": {"records": 1, "shards": shards}}}

    def signed(value: Any) -> bytes:
        if isinstance(value, dict):
            value = {**value, "digest": manifest.digest(value)}
        return json.dumps(value).encode("utf-8", "surrogatepass")

    def read(data: bytes, folder: Path) -> None:
        (folder / "x.tfrecord").write_bytes(b"abc")
        (folder / manifest.MANIFEST).write_bytes(data)
        manifest.read(epath.Path(folder))

    whole = {**fields, "digest": manifest.digest(fields)}
    return Target(st.one_of(damaged_json(fields).map(signed), json_bytes(whole)), read)


def tars() -> Target:
    from data_pipelines.records import tars

    def read(data: bytes, folder: Path) -> None:
        path, index = folder / "x.tar", epath.Path(folder / "out")
        path.write_bytes(data)
        for old in (folder / "out").rglob("*.*"):
            old.unlink()
        tar = tars.index_tar(str(path), index)
        tars.write_tars(index, [tar], 0.0)
        source = tars.Tars(index / tars.TARS, "train")
        source.read(0, len(source))

    return Target(damaged([_tar()]), read)


def _tar() -> bytes:
    import datasets

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in {
            "a.png": datasets.picture(1, 8),
            "a.txt": b"a cat",
            "b.png": datasets.picture(2, 8),
            "b.json": b'{"caption": "a dog"}',
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def store() -> Target:
    import datasets

    from data_pipelines.embeddings import store

    with tempfile.TemporaryDirectory() as folder:
        made = Path(datasets.write_store(Path(folder) / "s", ["a", "b", "c"], shards=1))
        files = {p.name: p.read_bytes() for p in made.iterdir() if p.is_file()}
    documents = {n: json.loads(d) for n, d in files.items() if n.endswith(".json")}
    names = sorted(files)

    def inputs(name: str) -> Bytes:
        return json_bytes(documents[name]) if name in documents else damaged([files[name]])

    def read(change: tuple[str, bytes], folder: Path) -> None:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / change[0]).write_bytes(change[1])
        from data_pipelines.embeddings.lookup import Lookup
        from data_pipelines.records.source import Bad

        lookup = Lookup(str(folder))
        for caption in ("a", "b", "other"):
            with contextlib.suppress(Bad):
                lookup(caption)
        store.open_store(str(folder))

    changes = [st.tuples(st.just(name), inputs(name)) for name in names]
    return Target(st.one_of(changes), read)


def lists() -> Target:
    from data_pipelines.ingestion.items import Columns
    from data_pipelines.ingestion.sources import listed

    rows = [{"file_name": "a.png", "caption": "a cat", "similarity": 0.3}, {"file_name": "b/c.png"}]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file_name", "caption"])
    writer.writeheader()
    writer.writerows([{"file_name": "a.png", "caption": 'a "big"\ncat'}] * 2)
    table = text.getvalue().encode()
    long = b"file_name,caption\na.png," + b"x" * 200_000
    jsonl = damaged_json(rows).map(
        lambda found: "\n".join(map(json.dumps, found)).encode("utf-8", "surrogatepass")
    )
    kinds = [
        st.tuples(st.just("x.csv"), damaged([table, long])),
        st.tuples(st.just("x.tsv"), damaged([table.replace(b",", b"\t")])),
        st.tuples(
            st.just("x.jsonl"), st.one_of(jsonl, damaged([b'{"file_name": "a", "text": 1}']))
        ),
        st.tuples(st.just("x.json"), json_bytes(rows)),
    ]

    def read(found: tuple[str, bytes], folder: Path) -> None:
        path = folder / found[0]
        path.write_bytes(found[1])
        source = listed.find([epath.Path(path)], Columns(), 4)
        for part in source.parts:
            list(part.read())

    return Target(st.one_of(kinds), read)


def coco() -> Target:
    from data_pipelines.ingestion.items import Columns
    from data_pipelines.ingestion.sources import coco

    document = {
        "images": [{"id": 1, "file_name": "a.png", "license": 1}],
        "annotations": [{"image_id": 1, "caption": "a cat"}],
        "licenses": [{"id": 1, "name": "free"}],
    }

    def read(data: bytes, folder: Path) -> None:
        path = folder / "captions_x.json"
        path.write_bytes(data)
        (folder / "a.png").write_bytes(b"x")
        source = coco.find([epath.Path(path)], Columns(), 4)
        for part in source.parts:
            list(part.read())

    return Target(json_bytes(document), read)


def webdataset() -> Target:
    from data_pipelines.ingestion.items import Columns
    from data_pipelines.ingestion.sources import webdataset

    def read(data: bytes, folder: Path) -> None:
        path = folder / "x.tar"
        path.write_bytes(data)
        source = webdataset.find([epath.Path(path)], Columns(), 4)
        for part in source.parts:
            list(part.read())

    return Target(damaged([_tar()]), read)


def images() -> Target:
    from PIL import Image

    from data_pipelines.ingestion import images as ingested
    from data_pipelines.reading import images
    from data_pipelines.records.source import Bad

    files = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        out = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(out, kind)
        files.append(out.getvalue())
    limits = ingested.Limits(16, 16, 4.0, 2**24, False)

    def read(data: bytes, folder: Path) -> None:
        with contextlib.suppress(Bad):
            assert images.decode(data, 16).shape == (16, 16, 3)
        ingested.convert("x", data, limits)

    return Target(damaged(files), read)
