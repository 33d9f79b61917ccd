"""WebDataset tars in place: the index, reading and training through it, and bad tars."""

import errno
import io
import json
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, load_config, shrink
from datasets import picture, write_store
from etils import epath

from data_pipelines import index_tars
from data_pipelines.embeddings import caption_lists
from data_pipelines.reading.reader import Reader
from data_pipelines.records import tars
from data_pipelines.records.opening import open_split
from data_pipelines.records.source import Bad
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples(first, num, folder=""):
    for i in range(first, first + num):
        name = f"{folder}{i:06d}"
        yield f"{name}.jpg", picture(i)
        if i % 2:
            yield f"{name}.txt", f"tar  {i}\n".encode()
            yield f"{name}.json", json.dumps({"caption": "unused", "key": str(i)}).encode()
        else:
            yield f"{name}.json", json.dumps({"caption": f"tar {i}", "punsafe": 0.1}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tars, indexed as the dataset "laion" in data."""
    path = tmp_path_factory.mktemp("tars")
    long = "x" * 120 + "/"  # needs a PAX header
    odd = [("README", b"hello"), ("lonely.jpg", picture(1)), ("no_image.txt", b"text")]
    paths = [
        write_tar(path / "a.tar", [*odd, *samples(0, 30)]),
        write_tar(path / "b.tar", samples(30, 20, long), format=tarfile.PAX_FORMAT),
    ]
    indexed = [tars.index_tar(p, epath.Path(path) / "data" / "laion") for p in paths]
    assert [tar.samples for tar in indexed] == [30, 20] and indexed[0].skipped == 3
    splits = tars.write_tars(epath.Path(path) / "data" / "laion", indexed, 0.02)
    assert splits == {"train": 34, "validation": 16}
    return path


def config(folder, store, **changes):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["sample_every"] = 0
    values["data"].update(dir=str(folder / "data"), build=False, task="laion", embeddings=store)
    values["data"].update(changes)
    return parse(values)


def test_samples_are_read_as_tarfile_reads_them(folder):
    train, held_out = (
        open_split(str(folder / "data"), "laion", s) for s in ("train", "validation")
    )
    records = [*train.read(0, 34), *held_out.read(0, 16)]
    assert train.files.reads == 2  # one for each tar
    assert [r.captions for r in records] == [(f"tar {i}",) for i in range(50)]
    assert records[0].id == "a/000000" and records[40].id == f"b/{'x' * 120}/000040"
    with tarfile.open(folder / "b.tar") as tar:
        expected = tar.extractfile(f"{'x' * 120}/000031.jpg").read()
    assert records[31].image == expected == picture(31)


def test_a_run_trains_on_tars_with_embeddings_from_a_store(folder):
    captions = list(caption_lists.read_dataset(str(folder / "data"), "laion"))
    assert len(captions) == 50
    store = write_store(folder / "store", [found.caption for found in captions])
    with pytest.raises(UserError, match=r"data\.embeddings is ''.*encode_text --dataset=laion"):
        Reader(config(folder, ""))
    for window in (0, 16):
        reader = Reader(config(folder, store, shuffle_window=window))
        batch = next(reader.train_batches(0))
        assert batch["image"].shape == (8, 32, 32, 3) and batch["text_mask"].any(1).all()
        names = {e.record.id for e in reader.training_examples(34, 34)}
        assert len(names) == 34
    assert len(reader.eval_batches()) == reader.config.eval_batches


def test_an_index_is_built_once_and_noticed_if_the_tar_changes(folder, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "c.tar", samples(0, 4))
    index = epath.Path(tmp_path / "laion")
    first = tars.index_tar(path, index)
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_samples", None)
        assert tars.index_tar(path, index) == first
    tars.write_tars(index, [first], 0)
    assert open_split(str(tmp_path), "laion", "train").read(2, 3)[0].captions == ("tar 2",)
    write_tar(path, samples(7, 90))
    with pytest.raises(UserError, match=r"c\.tar has .* bytes, but the index .*index_tars command"):
        open_split(str(tmp_path), "laion", "train").read(2, 3)
    tars.write_tars(index, [tars.index_tar(path, index)], 0)
    assert open_split(str(tmp_path), "laion", "train").read(2, 3)[0].captions == ("tar 9",)


def test_a_sample_without_caption_is_bad(tmp_path):
    files = [("a.jpg", picture(0)), ("a.json", b"{"), ("b.png", picture(1)), ("b.json", b"{}")]
    files += [("c.webp", picture(2)), ("c.json", b'{"captions": ["one", "two  words"]}')]
    path = write_tar(tmp_path / "a.tar", files)
    tars.write_tars(epath.Path(tmp_path / "laion"), [tars.index_tar(path, tmp_path / "laion")], 0)
    a, b, c = open_split(str(tmp_path), "laion", "train").read(0, 3)
    assert isinstance(a, Bad) and a.reason == "caption cannot be read"
    assert isinstance(b, Bad) and b.reason == "no caption" and b.record_id == "a/b"
    assert c.captions == ("one", "two words")


def run(*args):
    command = [sys.executable, "-m", "data_pipelines.index_tars", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_the_command_indexes_and_lists_bad_tars_in_one_line(tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 20))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    args = (f"--data_dir={tmp_path}", "--name=laion", f"--tars={tmp_path}/*.tar", "--workers=1")
    done = run(*args)
    assert done.returncode == 2 and not (tmp_path / "laion" / "tars.json").exists()
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "1 of 2 tars cannot be indexed" in error and "cut.tar: not a complete" in error
    done = run(*args, "--skip_bad")
    assert done.returncode == 0, done.stderr
    assert "train 10, validation 10" in done.stderr
    assert json.loads((tmp_path / "laion" / "tars.json").read_text())["splits"]["train"] == 10


def test_ids_are_tar_and_key_and_a_key_comes_once_in_a_tar(tmp_path):
    files = list(samples(0, 3))
    (tmp_path / "more").mkdir()
    paths = [write_tar(tmp_path / name, files) for name in ("a.tar", "more/a.tar")]
    index = epath.Path(tmp_path / "laion")
    tars.write_tars(index, [tars.index_tar(path, index) for path in paths], 0)
    ids = [record.id for record in open_split(str(tmp_path), "laion", "train").read(0, 6)]
    assert ids == [f"{tar}/{key:06d}" for tar in ("a", "more/a") for key in range(3)]
    path = write_tar(tmp_path / "b.tar", [*files, files[0]])
    with pytest.raises(UserError, match=r"b\.tar: the key '000000' occurs twice\. .*--sort=name"):
        tars.index_tar(path, index)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"no tar", "not a complete, uncompressed tar"), (b"", "not a complete, uncompressed tar")],
)
def test_a_file_that_is_no_tar_is_refused(tmp_path, data, words):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=words):
        tars.index_tar(str(tmp_path / "x.tar"), epath.Path(tmp_path))


def test_a_compressed_tar_and_one_without_samples_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match="not a complete, uncompressed tar"):
        tars.index_tar(str(tmp_path / "x.tar"), epath.Path(tmp_path))
    path = write_tar(tmp_path / "y.tar", [("a.mp3", b"x"), ("../../etc/b.txt", b"x")])
    with pytest.raises(UserError, match=r"no sample in 2 files; allowed: NAME\.jpg"):
        tars.index_tar(path, epath.Path(tmp_path))
    assert np.all([p.is_relative_to(tmp_path) for p in tmp_path.rglob("*")])


def test_a_damaged_note_about_a_tar_is_written_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 3))
    indexed = tars.index_tar(path, epath.Path(tmp_path))
    [note] = (tmp_path / "index").glob("*.json")
    for text in ("", "[1]", "{}"):
        note.write_text(text)
        assert tars.index_tar(path, epath.Path(tmp_path)) == indexed
        assert json.loads(note.read_text()) == list(indexed)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(0, 3))
    flags = {"tars": [path], "name": "a", "data_dir": str(tmp_path), "workers": 1}
    monkeypatch.setattr(index_tars, "FLAGS", SimpleNamespace(validation_fraction=0.0, **flags))
    monkeypatch.setattr(index_tars, "index", lambda *args: ([tars.Tar(path, 1, 3, 0)], []))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(tars, "write_json", full)
    with pytest.raises(UserError, match=r"/a cannot be written to: No space left on device$"):
        index_tars.main([])
