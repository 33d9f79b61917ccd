"""Hugging Face folders: shards, and one-line errors for damaged files and unsafe pickles."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util

from imagen_jax.common.errors import UserError
from imagen_jax.formats.torch import read_torch
from imagen_jax.text import load_encoder
from imagen_jax.text.clip import ClipConfig, ClipTextEncoder
from imagen_jax.text.families import CLIP_NAMES, namer
from imagen_jax.text.hf_format import WEIGHTS_FILE, load_t5, open_hf, save_t5
from imagen_jax.text.t5 import T5Config, T5Encoder

TINY = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=384)
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


def refusal(do, *args) -> str:
    """Returns the one-line message of the UserError that `do` raises."""
    with pytest.raises(UserError) as error:
        do(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path):
    t5 = T5Encoder(TINY, rngs=nnx.Rngs(0))
    save_t5(t5, tmp_path, dtype=np.float32, extra={"tokenizer_class": "ByT5Tokenizer"})
    return tmp_path


@pytest.fixture
def sharded(folder):
    tensors = list(safetensors.numpy.load_file(folder / WEIGHTS_FILE).items())
    (folder / WEIGHTS_FILE).unlink()
    weight_map = {}
    for n, name in enumerate(["b.safetensors", "a.safetensors"]):
        shard = dict(tensors[n::2])
        safetensors.numpy.save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_hashed_in_name_order(sharded):
    assert [f.name for f in open_hf(sharded).files] == ["a.safetensors", "b.safetensors"]
    before = load_encoder(sharded).identity["weights_sha256"]
    content = (sharded / "b.safetensors").read_bytes()
    (sharded / "b.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert load_encoder(sharded).identity["weights_sha256"] != before


def test_a_missing_shard_is_named(sharded):
    (sharded / "b.safetensors").unlink()
    assert "'b.safetensors' is not in this folder" in refusal(open_hf, sharded)


def test_a_shard_without_its_tensors_is_refused(sharded):
    safetensors.numpy.save_file({"x": np.zeros(1)}, sharded / "b.safetensors")
    assert "is missing; expected shape" in refusal(load_t5, sharded)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {"x": 3}}', '{"weight_map": {"x": "../y"}}']
)
def test_a_broken_index_is_refused(sharded, content):
    (sharded / INDEX_FILE).write_text(content)
    assert str(sharded) in refusal(open_hf, sharded)


def test_a_folder_without_weights_lists_the_supported_files(folder):
    (folder / WEIGHTS_FILE).unlink()
    message = refusal(open_hf, folder)
    assert "model.safetensors.index.json" in message and "pytorch_model.bin" in message


def safetensors_bytes(header: dict | bytes, data: bytes = bytes(8)) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00",
        (2**60).to_bytes(8, "little") + b"{}",
        safetensors_bytes(b"{ not json"),
        safetensors_bytes(b"\xff\xfe{}"),
        safetensors_bytes(b"[1]"),
        safetensors_bytes({"x": 1}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [2]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8]}}),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [2] + [1] * 70, "data_offsets": [0, 8]}}),
        safetensors_bytes(b"[" * 100_000),
        safetensors_bytes({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}),
    ],
)
def test_a_damaged_safetensors_file_is_refused(folder, content):
    (folder / WEIGHTS_FILE).write_bytes(content)
    assert refusal(open_hf, folder).startswith(f"{folder / WEIGHTS_FILE}: not safetensors")


def test_a_truncated_file_is_refused_before_any_tensor_is_read(folder):
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-100])
    assert "is outside the file" in refusal(open_hf, folder)


def test_quantized_weights_are_refused(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    quantized = {name: (100 * tensor).astype(np.int8) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(quantized, folder / WEIGHTS_FILE)
    assert "weight' has dtype int8; quantized weights are not supported" in refusal(load_t5, folder)


class Call:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def write_bin(folder, pickled: bytes):
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(8))


def test_a_pickle_cannot_run_code(folder):
    trace = folder / "trace"
    for call in [
        Call(os.mkdir, (str(trace),)),
        Call(exec, (f"import os; os.mkdir({str(trace)!r})",)),
        Call(getattr, (str, "format")),
        {"a tensor": [Call(os.mkdir, (str(trace),))]},
    ]:
        write_bin(folder, pickle.dumps(call))
        assert "only plain tensors are read" in refusal(open_hf, folder)
        (folder / "pytorch_model.bin").write_bytes(
            pickle.dumps(call)
        )  # the layout before PyTorch 1.6
        assert "only plain tensors are read" in refusal(open_hf, folder)
    assert not trace.exists()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor_pickle(shape, strides):
    """A state dict of one tensor, in a storage of 8 bytes that `write_bin` adds."""
    words = (b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu")
    storage = b"(" + words[0] + b"ctorch\nFloatStorage\n" + words[1] + words[2] + b"K\x02tQ"
    tensor = REBUILD + b"(" + storage + b"K\x00" + shape + strides + b"tR"
    return b"\x80\x02}X\x01\x00\x00\x00x" + tensor + b"s."


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"x": 1})[:-1],
        b"\x80\x02" + REBUILD + b"}X\x01\x00\x00\x00aK\x01sb.",  # sets __dict__ of the function
        b"\x80\x02" + REBUILD + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b.",  # and an attribute
        b"\x80\x02" + REBUILD + b")R.",
        b"\x80\x02}X\x01\x00\x00\x00xX\x03\x00\x00\x00pidQs.",
        tensor_pickle(shape=b"I1000000\nI1000000\n\x86", strides=b"K\x00K\x00\x86"),
        tensor_pickle(shape=b"I-1\nI-1\n\x86", strides=b"K\x01K\x01\x86"),
    ],
)
def test_a_damaged_or_malicious_bin_file_is_refused(folder, pickled):
    write_bin(folder, pickled)
    message = refusal(open_hf, folder)
    assert message.startswith(f"{folder / 'pytorch_model.bin'}: not a state dict saved by torch")


def test_a_tensor_of_the_same_pickle_with_a_true_shape_is_read(folder):
    write_bin(folder, tensor_pickle(shape=b"K\x02\x85", strides=b"K\x01\x85"))
    tensor = read_torch(folder / "pytorch_model.bin")["x"]
    assert tensor.shape == (2,) and tensor.read((slice(None),)).tolist() == [0, 0]


@pytest.mark.parametrize("value", [10**9, 0, -1, 2**40])
def test_a_config_of_impossible_size_is_refused_before_it_is_built(folder, value):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_layers": value}))
    assert f"num_layers is {value}; allowed: " in refusal(open_hf, folder)


@pytest.mark.parametrize("vocab_size", [100, 5000])
def test_a_vocabulary_that_does_not_match_the_weights_is_refused(tmp_path, vocab_size):
    config = T5Config(16, 4, 24, num_layers=1, num_heads=4, vocab_size=vocab_size)
    t5 = T5Encoder(config, rngs=nnx.Rngs(0))
    save_t5(t5, tmp_path, dtype=np.float32, extra={"tokenizer_class": "ByT5Tokenizer"})
    assert f"259 tokens, but its weights have {vocab_size}" in refusal(load_encoder, tmp_path)


@pytest.mark.parametrize(
    "kind, files",
    [
        ("T5TokenizerFast", "spiece.model or sentencepiece.model or tokenizer.json"),
        ("BertTokenizer", "vocab.txt or tokenizer.json"),
        ("CLIPTokenizer", "vocab.json + merges.txt or tokenizer.json"),
    ],
)
def test_missing_and_damaged_vocabularies_are_refused_by_name(folder, kind, files):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert files in refusal(load_encoder, folder)
    for name in files.replace(" + ", " or ").split(" or "):
        (folder / name).write_bytes(b"\xff\xfe not a vocabulary")
        if name != "vocab.json":  # incomplete without merges.txt
            assert str(folder) in refusal(load_encoder, folder)


CLIP = ClipConfig(16, 2, 4, 24, vocab_size=260)


@pytest.fixture
def clip_folder(tmp_path):
    from tokenizers import pre_tokenizers

    weights = nnx.to_pure_dict(nnx.state(ClipTextEncoder(CLIP, rngs=nnx.Rngs(0))))
    leaves = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    name = namer(CLIP_NAMES, leaves)
    tensors = {
        f"text_model.{name(k)}": np.ascontiguousarray(v.T if k[-1] == "kernel" else v)
        for k, v in traverse_util.flatten_dict(weights).items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS_FILE)
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 24, "vocab_size": 260}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    alphabet = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    alphabet += sorted(pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(alphabet)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return tmp_path


def test_clip_encodes_captions_up_to_its_last_position(clip_folder):
    encoder = load_encoder(clip_folder, 77)
    captions = ["a", "a b " * 35, "a b " * 37 + "b"]
    assert [e.shape for e in encoder.encode(captions)] == [(3, 16), (72, 16), (77, 16)]
    assert encoder.identity["tokenizer"] == "bpe" and encoder.identity["dim"] == 16
    found, expected = encoder.encode(["a b " * 60, "a b " * 37 + "a"], truncate=True)
    np.testing.assert_array_equal(found, expected)
    assert "max_tokens is 78" in refusal(load_encoder, clip_folder, 78)
    assert "only 77 positions" in refusal(load_encoder, clip_folder, 78)


def test_calling_the_encoder_maps_ids_and_mask_to_embeddings_and_mask(clip_folder):
    encoder = load_encoder(clip_folder, 77)
    ids, mask = np.array([[0, 2, 1, 0]]), np.array([[True, True, True, False]])
    embeddings, mask_out = encoder(ids, mask)
    assert embeddings.shape == (1, 4, encoder.dim) and embeddings.dtype == encoder.dtype
    np.testing.assert_array_equal(mask_out, mask)
