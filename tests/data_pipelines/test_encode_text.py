"""Encoding captions into a store: resuming, splitting, skipped captions, and readable output."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from pyarrow import parquet

from data_pipelines import encode_text
from data_pipelines.common import caption_key
from data_pipelines.embeddings import caption_lists, encoding
from data_pipelines.embeddings.shards import describe, finish
from data_pipelines.embeddings.store import Store, create_store, open_store
from imagen_jax.common.errors import UserError
from imagen_jax.text import load_encoder
from imagen_jax.text.encoder import Batch

CAPTIONS = [f"{i} red circles" for i in range(60)]


class Encoder:
    """Embeds each byte of a caption. Fails after `dies_after` batches, as if power were lost."""

    max_tokens = 20

    def __init__(self, dies_after=None):
        self.identity = {"encoder": "fake", "dim": 4, "max_tokens": 20, "dtype": "bfloat16"}
        self.seen, self._left = [], dies_after

    def num_tokens(self, caption):
        return len(caption.encode())

    def batches(self, captions):
        for caption in captions:
            if self._left == len(self.seen):
                raise KeyboardInterrupt
            self.seen.append(caption)
            rng = np.random.default_rng(list(caption.encode()))
            embedding = rng.normal(size=(self.num_tokens(caption), 4)).astype(ml_dtypes.bfloat16)
            yield Batch({caption: embedding}, 32)


def found(captions):
    return [caption_lists.Found("a.txt", i, caption) for i, caption in enumerate(captions)]


def fill(path, captions=CAPTIONS, dtype="bfloat16", part=0, parts=1, encoder=None):
    """Does the work of one of `parts` processes; returns the encoder, the store and its report."""
    encoder = encoder or Encoder()
    store = create_store(str(path), encoder.identity, dtype, 4)
    shards = encoding.assign(store, found(captions), part, parts)
    encoding.encode(store, shards, encoder)
    return encoder, store, finish(store)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_files_depend_only_on_the_captions(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "b", [*CAPTIONS, *CAPTIONS])
    for part in (2, 0, 1):
        *_, report = fill(tmp_path / "c", CAPTIONS, part=part, parts=3)
    assert report["captions"] == 60
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert len(contents(tmp_path / "a")) == 3 * 4 + 2


def test_each_distinct_caption_is_encoded_once(tmp_path):
    encoder, *_ = fill(tmp_path, CAPTIONS * 3)
    assert sorted(encoder.seen) == sorted(CAPTIONS)


def test_an_interrupted_store_is_completed(tmp_path, capsys):
    fill(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cut", encoder=Encoder(dies_after=40))
    # A killed process leaves a temporary file behind, but no partial shard.
    (tmp_path / "cut" / ".shard-00003-of-00004.npy.0123.tmp").write_bytes(b"half")
    names = {path.name.split(".")[0] for path in (tmp_path / "cut").glob("shard*")}
    store = Store(tmp_path / "cut", {}, "bfloat16", 4)
    done = store.finished()
    assert len(names) == len(done) and 0 < len(done) < 4
    with pytest.raises(UserError, match=f"has {len(done)} of its 4 shards"):
        open_store(str(tmp_path / "cut"))
    before = {shard: store.file(shard, ".tfrecord").stat().st_mtime_ns for shard in done}
    encoder, *_ = fill(tmp_path / "cut")
    assert 20 <= len(encoder.seen) < 60
    assert before == {s: store.file(s, ".tfrecord").stat().st_mtime_ns for s in done}
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    assert f"{len(done)} of 4 shards already exist" in capsys.readouterr().err


def test_a_shard_with_other_captions_is_rewritten(tmp_path):
    fill(tmp_path / "whole")
    fill(tmp_path / "grown", CAPTIONS[:-1])
    encoder, *_ = fill(tmp_path / "grown")
    assert 0 < len(encoder.seen) < 60
    assert contents(tmp_path / "whole") == contents(tmp_path / "grown")


def test_bad_captions_are_skipped_counted_and_listed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a  red\tcircle\n\n\xff\xfe no\n" + b"x" * 21 + b"\nlast\n\n")
    store = create_store(str(tmp_path / "s"), Encoder().identity, "int8", 2)
    rows = caption_lists.read_file(str(tmp_path / "a.txt"), "caption")
    encoding.encode(store, encoding.assign(store, rows, 0, 1), Encoder())
    report = finish(store)
    assert report["captions"] == 2
    assert json.loads((tmp_path / "s" / "report.json").read_text()) == report
    skipped = {s["name"].rpartition(":")[2]: (s["reason"], s["detail"]) for s in report["skipped"]}
    assert skipped == {
        "2": ("empty caption", ""),
        "3": ("caption not UTF-8", "?? no"),
        "4": ("caption longer than 20 tokens", "21 tokens"),
    }
    text = describe(store, report)
    assert "skipped 3: " in text and "caption not UTF-8 1" in text


def test_the_report_has_the_size_and_accuracy_of_both_forms(tmp_path):
    *_, store, report = fill(tmp_path, dtype="int8")
    tokens = sum(map(len, CAPTIONS))
    assert (report["captions"], report["tokens"]) == (60, tokens)
    sizes = {name: form["bytes_per_million_captions"] for name, form in report["forms"].items()}
    assert sizes == {
        "bfloat16": round(1e6 * (tokens * 8 / 60 + 44)),
        "int8": round(1e6 * (tokens * 8 / 60 + 44)),  # with 4 numbers per token int8 saves nothing
    }
    stored = sum(f.stat().st_size for f in tmp_path.glob("shard*") if f.suffix != ".json")
    assert stored - 4 * 192 == pytest.approx(60 * sizes["int8"] / 1e6, abs=1)
    exact, rounded = report["forms"]["bfloat16"], report["forms"]["int8"]
    assert exact["cosine_mean"] == pytest.approx(1) and exact["cosine_min"] == pytest.approx(1)
    assert 0.999 < rounded["cosine_min"] < rounded["cosine_mean"] < 1
    assert "GiB per million" in describe(store, report)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    class Broken(Encoder):
        def batches(self, captions):
            for caption in captions:
                yield Batch({caption: np.full((2, 4), np.nan, ml_dtypes.bfloat16)}, 32)

    with pytest.raises(UserError, match=r"'.* red circles' is not finite"):
        fill(tmp_path, encoder=Broken())


def test_a_missing_dataset_is_an_error_before_anything_is_printed_or_written(tmp_path):
    command = [sys.executable, "-m", "data_pipelines.encode_text", f"--out={tmp_path / 's'}"]
    options = ["--dataset=scenes/32", f"--data_dir={tmp_path}"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: data.dir=") and "has no dataset 'scenes/32'" in line
    assert not (tmp_path / "s").exists()


def test_a_folder_that_cannot_be_written_to_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"--out={out} cannot be written to: ") as error:
            fill(out)
        assert "\n" not in str(error.value)


def test_fsdp_must_divide_the_number_of_devices():
    with pytest.raises(UserError, match=r"--fsdp is 3; it must divide this host's 8 device"):
        encoding.load_encoder("byte-tiny", 64, fsdp=3)


def test_bad_input_is_a_one_line_error_and_exit_code_2(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n")
    create_store(str(tmp_path / "s"), Encoder().identity, "int8", 4)
    command = [sys.executable, "-m", "data_pipelines.encode_text", f"--out={tmp_path / 's'}"]
    options = [f"--captions={tmp_path / 'a.txt'}", "--dtype=int8", "--num_shards=4"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("text encoder ")]
    assert line.startswith("error: --out=") and "encoder=fake (now byte-tiny)" in line


def test_a_store_with_other_settings_is_refused_with_both_values(tmp_path):
    fill(tmp_path)
    with pytest.raises(UserError, match=r"stored_dtype=bfloat16 \(now int8\)"):
        fill(tmp_path, dtype="int8")
    other = Encoder()
    other.identity["encoder"] = "other"
    with pytest.raises(UserError, match=r"encoder=fake \(now other\)"):
        fill(tmp_path, encoder=other)


def read(path, column="caption"):
    return [(row.number, row.caption) for row in caption_lists.read_file(str(path), column)]


def test_text_csv_and_parquet_are_read(tmp_path):
    awkward = ['a, "b"', "two\nlines", "", "\u00e9\U0001f600"]
    collapsed = ['a, "b"', "two lines", "", "\u00e9\U0001f600"]
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo  three\n\u00e9".encode())
    assert read(tmp_path / "a.txt") == [(1, "one"), (2, "two three"), (3, "\u00e9")]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        file.write('id,caption\n1,"a, ""b"""\n2,"two\nlines"\n3\n4,\u00e9\U0001f600\n')
    assert [caption for _, caption in read(tmp_path / "a.csv")] == collapsed
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"words": pa.array([*awkward, None], kind), "id": range(5)})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        assert [c for _, c in read(tmp_path / "a.parquet", "words")] == [*collapsed, ""]
    table = pa.table({"caption": pa.array([b"ok", b"\xff"])})
    parquet.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [(0, "ok"), (1, "\udcff")]


def test_unreadable_files_are_one_line_errors(tmp_path):
    (tmp_path / "a.csv").write_text("id,words\n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    parquet.write_table(pa.table({"caption": [1, 2]}), tmp_path / "b.parquet")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="no column --column=caption; it has: id, words"):
        read(tmp_path / "a.csv")
    for name in ("a.parquet", "b.parquet"):
        with pytest.raises(UserError, match=name) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        caption_lists.expand([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match=r"allowed: \.txt, \.csv, \.parquet"):
        caption_lists.expand([str(tmp_path / "a.json")])
    assert len(caption_lists.expand([str(tmp_path / "?.parquet"), str(tmp_path / "a.*t")])) == 2


@pytest.mark.parametrize("value", ["4/4", "a/b", "1", "-1/2", "1/2/3"])
def test_a_malformed_shard_flag_is_refused(value):
    with pytest.raises(UserError, match="allowed: i/n"):
        encode_text.parse_split(value)
    assert encode_text.parse_split("2/3") == (2, 3)
    assert encode_text.parse_split("") == (0, 1)


def test_the_command_encodes_files_and_a_dataset(tmp_path, tiny_data):
    (tmp_path / "a.txt").write_text("a red circle\nfive dogs\n")
    out = tmp_path / "store"
    command = [sys.executable, "-m", "data_pipelines.encode_text", f"--out={out}"]
    options = ["--num_shards=2", "--max_tokens=48", f"--captions={tmp_path / 'a.txt'}"]
    options += ["--dataset=scenes/32", f"--data_dir={tiny_data}"]
    # One device, and the only process of a SLURM job.
    slurm = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": 1, "PROCID": 0, "LOCALID": 0}
    env = {**os.environ, "XLA_FLAGS": "", **{f"SLURM_{k}": str(v) for k, v in slurm.items()}}
    command.append("--distributed")
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for words in ("tokens/s", "padding", "GiB per million captions"):
        assert words in done.stderr
    assert "port.cc" not in done.stderr  # TensorFlow's messages
    store = open_store(str(out))
    captions = ["a red circle", "five dogs", "not there"]
    found = [store.find(caption_key(caption)) for caption in captions]
    assert [place is not None for place in found] == [True, True, False]
    [expected] = load_encoder().encode(["five dogs"])
    shard, offset, _ = found[1]
    data = store.file(shard, ".tfrecord").read_bytes()[offset + 12 :][: expected.nbytes]
    assert data == expected.tobytes()
