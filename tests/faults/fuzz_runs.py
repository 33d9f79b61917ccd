"""Readers of weights, vocabularies, workdirs, configs, and messages of other processes."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from imagen_jax.common.errors import UserError

from .damage import ATOMS, ROOT, Target, damaged, damaged_json, json_bytes


def safetensors() -> Target:
    from safetensors.numpy import save

    from imagen_jax.formats.tensors import read_safetensors

    good = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.int8)})
    length = struct.unpack("<Q", good[:8])[0]
    header, rest = json.loads(good[8 : 8 + length]), good[8 + length :]

    def joined(document: Any) -> bytes:
        text = json.dumps(document).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + rest

    def read(data: bytes, folder: Path) -> None:
        path = folder / "x.safetensors"
        path.write_bytes(data)
        for tensor in read_safetensors(path).values():
            tensor.read((slice(None),) * len(tensor.shape))

    return Target(st.one_of(damaged([good]), damaged_json(header).map(joined)), read)


def torch() -> Target:
    from imagen_jax.formats.torch import read_torch

    words = b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu"
    storage = b"(" + words[0] + b"ctorch\nFloatStorage\n" + words[1] + words[2] + b"K\x02tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x02\x85K\x01\x85tR"
    pickled = b"\x80\x02}X\x01\x00\x00\x00x" + tensor + b"s."

    def zipped(data: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/data/0", bytes(8))
        return out.getvalue()

    def read(data: bytes, folder: Path) -> None:
        path = folder / "x.bin"
        path.write_bytes(data)
        for found in read_torch(path).values():
            found.read((slice(None),) * len(found.shape))

    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1, 2) * 2 + pickled
    inputs = [damaged([zipped(pickled), legacy]), damaged([pickled]).map(zipped)]
    return Target(st.one_of(inputs), read)


def vocabularies() -> Target:
    import tokenizers

    from imagen_jax.text.tokenizer import load_tokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "cat", "red"]
    wordpiece = "\n".join(pieces).encode()
    bpe = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3, "c": 4, "t</w>": 5}
    bpe |= {"ca": 6, "cat</w>": 7}
    merges = b"#version: 0.2\nc a\nca t</w>\n"
    words = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.models.WordPiece(words, unk_token="[UNK]")
    library = json.loads(tokenizers.Tokenizer(model).to_str())
    settings_file = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
    whole = json.dumps(bpe).encode()
    kinds = [
        st.tuples(st.just("BertTokenizer"), st.just("vocab.txt"), damaged([wordpiece])),
        st.tuples(st.just("BertTokenizer"), st.just("tokenizer.json"), json_bytes(library)),
        st.tuples(
            st.just("BertTokenizer"), st.just("tokenizer_config.json"), json_bytes(settings_file)
        ),
        st.tuples(st.just("CLIPTokenizer"), st.just("vocab.json"), json_bytes(bpe)),
        st.tuples(st.just("CLIPTokenizer"), st.just("merges.txt"), damaged([merges])),
        st.tuples(st.just("T5Tokenizer"), st.just("spiece.model"), damaged([_sentencepiece()])),
    ]
    beside = {
        "tokenizer_config.json": {"vocab.txt": wordpiece},
        "vocab.json": {"merges.txt": merges},
        "merges.txt": {"vocab.json": whole},
    }

    def read(found: tuple[str, str, bytes], folder: Path) -> None:
        kind, name, data = found
        for old in folder.iterdir():
            old.unlink()
        for other, content in {**beside.get(name, {}), name: data}.items():
            (folder / other).write_bytes(content)
        load_tokenizer(folder, kind).encode("a red cat, ab")

    return Target(st.one_of(kinds), read)


def _sentencepiece() -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat", "a blue dog", "the red dog"] * 5),
        model_writer=out, vocab_size=16, eos_id=1, pad_id=0, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def workdir() -> Target:
    from imagen_jax.runs import checksums, verification, workdir
    from imagen_jax.training import goodput
    from launch import status

    config = {"num_steps": 10, "log_every": 1, "seed": 0, "batch_size": 2}
    line = {"step": 3, "step_time": 0.5, "images_per_s": 4.0, "loss": 0.5, "mfu": 0.1}
    lines = json.dumps(line).encode() + b"\n" + json.dumps({"step": 3, "eval_loss": 1.0}).encode()
    state = {"state": "running", "step": 3, "host": "h", "heartbeat": 5.0, "reason": ""}
    seconds = dict.fromkeys(goodput.PARTS, 1.0)
    start = {"began": 0.0, "from_step": 0, "step": 3, "seconds": seconds}
    spent = {"seconds": seconds, "starts": [start]}
    files = {
        "config.json": json_bytes(config),
        "metrics.jsonl": st.one_of(
            damaged([lines + b"\n"]),
            damaged_json([line]).map(lambda found: json.dumps(found[:1])[1:-1].encode() + b"\n"),
        ),
        "state.json": json_bytes(state),
        "goodput.json": json_bytes(spent),
    }
    whole = {
        "config.json": json.dumps(config).encode(),
        "metrics.jsonl": lines + b"\n",
        "state.json": json.dumps(state).encode(),
        "goodput.json": json.dumps(spent).encode(),
    }
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder)
        (saved / "array").write_bytes(b"weights")
        (saved / checksums.METADATA).write_text('{"a": 1}')
        checksums.write(saved)
        sums = json.loads((saved / checksums.CHECKSUMS).read_text())
    names = {checksums.CHECKSUMS: json_bytes(sums), checksums.METADATA: json_bytes({"a": 1})}

    def read(change: tuple[str, bytes], folder: Path) -> None:
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        saved = folder / "checkpoints" / "step_1"
        saved.mkdir(parents=True, exist_ok=True)
        (saved / "array").write_bytes(b"weights")
        (saved / checksums.METADATA).write_text('{"a": 1}')
        (saved / checksums.CHECKSUMS).write_text(json.dumps(sums))
        name, data = change
        (saved if name in names else folder).joinpath(name).write_bytes(data)
        list(verification.problems(folder))
        workdir.read_metrics(folder)
        goodput._read(folder / "goodput.json")
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            status.summary(folder, 10.0)
        with contextlib.suppress(UserError):
            workdir.read_config(folder)

    changes = [st.tuples(st.just(n), strategy) for n, strategy in {**files, **names}.items()]
    return Target(st.one_of(changes), read)


def configs() -> Target:
    import dataclasses

    from imagen_jax.common import typed_config
    from imagen_jax.config import parse

    loaded = typed_config.load(str(ROOT / "configs" / "demo.py") + ":unet")
    known = typed_config.keys(dataclasses.asdict(parse(loaded)))
    keys = st.one_of(st.sampled_from(known), st.text(max_size=12), st.just("model.name"))
    values = st.one_of(
        st.text(max_size=12),
        st.sampled_from(ATOMS).map(lambda value: repr(value)[:6000]),
        st.integers().map(str),
        st.floats().map(str),
        st.recursive(st.integers(), st.lists, max_leaves=4).map(repr),
    )
    overrides = st.lists(st.tuples(keys, values).map("=".join), min_size=1, max_size=2)

    def read(found: Any, folder: Path) -> None:
        path = folder / "config.json"
        if isinstance(found, bytes):
            path.write_bytes(found)
            parse(typed_config.load(str(path)))
        else:
            path.write_text(json.dumps(loaded))
            parse(typed_config.load(str(path), found))

    return Target(st.one_of(overrides, json_bytes(json.loads(json.dumps(loaded)))), read)


def messages() -> Target:
    from imagen_jax.devices import rendezvous

    hello = {"protocol": rendezvous.PROTOCOL, "process_id": 1, "settings": {"config.seed": 0}}

    def read(line: bytes, folder: Path) -> None:
        with contextlib.suppress(*rendezvous.BAD_PEER):
            process_id, theirs = rendezvous._checked_hello(line)
            difference = rendezvous._difference({0: hello["settings"], process_id: theirs})
            assert "\n" not in difference and len(difference) < 2000

    return Target(json_bytes(hello), read)
