"""Loading onto a mesh: same results, each byte read once, little host memory at a time."""

from __future__ import annotations

import functools
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from data_pipelines.embeddings.shards import cosines
from imagen_jax.devices.sharding import (
    MeshConfig,
    batch_ways,
    bytes_per_device,
    make_mesh,
    put_batch,
    weight_shardings,
    with_shardings,
)
from imagen_jax.formats.tensors import FileTensor, contiguous_strides
from imagen_jax.text import load_encoder, loading
from imagen_jax.text.bert import BertConfig, BertEncoder
from imagen_jax.text.clip import ClipConfig, ClipTextEncoder
from imagen_jax.text.encoder import BATCH
from imagen_jax.text.hf_format import open_hf, save_t5
from imagen_jax.text.t5 import PRESETS, T5Config, T5Encoder

# Large enough for its matrices to be sharded over 8 devices.
CONFIG = T5Config(d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, vocab_size=384)
FULL = slice(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    model = T5Encoder(CONFIG, rngs=nnx.Rngs(0))
    save_t5(model, folder, dtype=np.float32, extra={"tokenizer_class": "ByT5Tokenizer"})
    return folder


def place(**axes):
    return functools.partial(weight_shardings, make_mesh(MeshConfig(**axes)))


def test_sharded_weights_give_the_same_embeddings(folder):
    captions = ["a red circle", "x" * 30, ""]
    whole = load_encoder(folder)
    sharded = load_encoder(folder, place=place(fsdp=8, data=1))
    kernel = sharded._weights.blocks[1].mlp.up.kernel[...]
    assert {s.data.shape for s in kernel.addressable_shards} == {(32, 512)}  # whole tiles
    assert sharded.identity == whole.identity
    for a, b in zip(whole.encode(captions), sharded.encode(captions), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=0.02)


def test_a_batch_split_over_devices_gives_the_same_bits(folder):
    mesh = make_mesh(MeshConfig())
    spread = load_encoder(
        folder,
        place=functools.partial(weight_shardings, mesh),
        put=functools.partial(put_batch, mesh),
        ways=batch_ways(mesh),
    )
    captions = [f"{i} red circles" for i in range(40)]
    [batch] = spread.batches(captions)
    assert batch.positions == 8 * BATCH * 16
    for caption, expected in zip(captions, load_encoder(folder).encode(captions), strict=True):
        np.testing.assert_array_equal(batch.embeddings[caption], expected)


class Reads:
    """Records the size of every read from the files."""

    def __init__(self, monkeypatch):
        self.sizes = []
        read = FileTensor.read

        def counted(tensor, index):
            part = read(tensor, index)
            self.sizes.append(part.nbytes)
            return part

        monkeypatch.setattr(FileTensor, "read", counted)


@pytest.mark.parametrize("axes", [{"fsdp": 8, "data": 1}, {"fsdp": 4, "data": 2}], ids=str)
def test_each_byte_is_read_once_in_parts_of_one_shard(folder, axes, monkeypatch):
    reads = Reads(monkeypatch)
    model = open_hf(folder).load(place(**axes))
    weights = jax.tree.leaves(nnx.state(model))
    assert sum(reads.sizes) == sum(w.nbytes for w in weights)
    assert max(reads.sizes) == CONFIG.d_ff * CONFIG.d_model * 4 / axes["fsdp"]
    whole = open_hf(folder).load()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(whole))


def test_loading_holds_one_tensor_in_host_memory(tmp_path):
    """32 MiB of weights in tensors of at most 4 MiB; a device's share of them is also 4 MiB."""
    config = T5Config(512, 64, 2048, num_layers=2, num_heads=8, vocab_size=384)
    specs = nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nnx.state(specs))
    save_t5(nnx.merge(nnx.graphdef(specs), zeros), tmp_path, dtype=np.float32, extra={})
    checkpoint = open_hf(tmp_path)
    tracemalloc.start()
    try:
        model = checkpoint.load(place(fsdp=8, data=1))
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total = sum(w.nbytes for w in jax.tree.leaves(nnx.state(model)))
    assert total > 32 * 2**20
    # On CPUs the loaded weights may keep the host buffers of the reads; those count in `after`.
    assert peak - after < 10 * 2**20


def test_random_weights_do_not_depend_on_the_mesh():
    whole = load_encoder("byte-tiny-random")
    spread = load_encoder("byte-tiny-random", place=place(fsdp=8, data=1))
    [expected], [found] = whole.encode(["a red circle"]), spread.encode(["a red circle"])
    np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=0.05)


def test_bfloat16_weights_take_half_the_memory_and_barely_change_embeddings(folder, monkeypatch):
    captions = ["a red circle", "two dogs left of a house, " * 5]
    whole, reads = load_encoder(folder), Reads(monkeypatch)
    half = load_encoder(f"{folder}-bfloat16", place=place(fsdp=8, data=1))
    assert max(reads.sizes) == CONFIG.d_ff * CONFIG.d_model * 4 / 8
    assert {w.dtype for w in jax.tree.leaves(half._weights)} == {np.dtype(ml_dtypes.bfloat16)}
    assert half.identity == {**whole.identity, "encoder": f"{folder.name}-bfloat16"}
    for a, b in zip(whole.encode(captions), half.encode(captions), strict=True):
        assert 0.999 < cosines(a, b).min() < cosines(a, b).max() < 1


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


@pytest.mark.parametrize(
    "module, config",
    [
        (T5Encoder, T5Config(16, 4, 24, num_layers=2, num_heads=4, vocab_size=50)),
        (BertEncoder, BertConfig(16, vocab_size=50, **SMALL)),
        (ClipTextEncoder, ClipConfig(16, vocab_size=50, **SMALL)),
    ],
    ids=["t5", "bert", "clip"],
)
def test_only_the_weights_are_rounded(module, config):
    """The network computes in float32 whatever the type of the weights."""
    graphdef, state = nnx.split(module(config, rngs=nnx.Rngs(0)))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    ids, mask = np.arange(14).reshape(2, 7), np.ones((2, 7), bool)
    found, expected = (nnx.merge(graphdef, weights)(ids, mask) for weights in (half, rounded))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_loading_logs_the_peak_host_memory(folder, caplog):
    with caplog.at_level("INFO", logger="imagen_jax"):
        load_encoder(folder)
    assert "GB of weights; peak host memory so far" in caplog.text
    assert 1e8 < loading.peak_host_bytes() < 1e12


def test_xxl_takes_an_eighth_of_its_size_on_each_of_eight_devices():
    model = nnx.eval_shape(lambda: T5Encoder(PRESETS["t5-v1_1-xxl"], rngs=nnx.Rngs(0)))
    specs = nnx.to_pure_dict(nnx.state(model))
    total = sum(x.size * 4 for x in jax.tree.leaves(specs))
    one = bytes_per_device(with_shardings(specs, place(fsdp=8, data=1)(specs)))
    assert total / 8 <= one < 1.001 * total / 8


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64], ids=str)
def test_reading_a_part_of_a_view_matches_numpy_indexing(tmp_path, dtype):
    dtype = np.dtype(dtype)
    array = np.random.default_rng(0).integers(0, 99, (3, 1, 4, 5)).astype(dtype)
    path = tmp_path / "numbers"
    path.write_bytes(b"header" + array.tobytes())
    stored = FileTensor(
        path, 6, dtype, array.shape, contiguous_strides(array.shape, dtype.itemsize)
    )
    some = [(FULL, slice(1, 2), slice(0, 1)), (FULL,), (FULL, slice(1, 3)), (FULL, slice(2, 5))]
    for index in itertools.product(*some):
        np.testing.assert_array_equal(stored.read(index), array[index])
        np.testing.assert_array_equal(stored.T.read(index[::-1]), array[index].T)
    scalar = FileTensor(path, 6, dtype, (), ())
    assert scalar.read(()) == array.flat[0]
