"""Reading T5X checkpoints, which these tests write: a msgpack index and gzipped zarr arrays."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax import nnx, serialization

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import sha256
from imagen_jax.devices.sharding import MeshConfig, make_mesh, weight_shardings
from imagen_jax.text import load_encoder
from imagen_jax.text.t5 import T5Config, T5Encoder
from imagen_jax.text.t5x_format import ArrayTensor, JoinedTensor, open_t5x

TINY = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=384)
V1_0 = T5Config(16, 8, 24, num_layers=1, num_heads=3, vocab_size=50, feed_forward_proj="relu")
UMT5 = T5Config(16, 4, 24, num_layers=3, num_heads=4, vocab_size=50, bias_in_every_block=True)
LARGE = T5Config(256, 64, 512, num_layers=1, num_heads=4, vocab_size=384)
VALUE = "target.encoder.layers_0.attention.value.kernel"


def target(model: T5Encoder) -> dict:
    """Returns the weights with T5X's names and axis order."""
    layers = {}
    for number, block in enumerate(model.blocks):
        attention = {n: {"kernel": getattr(block.attention, n).kernel} for n in
                     ("query", "key", "value", "out")}  # fmt: skip
        names = {"gate": "wi_0", "up": "wi_1", "hidden": "wi", "down": "wo"}
        mlp = {t: {"kernel": getattr(block.mlp, n).kernel} for n, t in names.items()
               if hasattr(block.mlp, n)}  # fmt: skip
        layers[f"layers_{number}"] = {
            "attention": attention,
            "mlp": mlp,
            "pre_attention_layer_norm": {"scale": block.attention_norm.scale},
            "pre_mlp_layer_norm": {"scale": block.mlp_norm.scale},
        }
        if model.config.bias_in_every_block:
            layers[f"layers_{number}"]["relpos_bias"] = relpos_bias(block)
    encoder = {**layers, "encoder_norm": {"scale": model.final_norm.scale}}
    if not model.config.bias_in_every_block:
        encoder["relpos_bias"] = relpos_bias(model)
    embedder = {"embedding": model.embed.embedding}
    decoder = {"decoder_norm": {"scale": np.ones(3)}}
    return {"encoder": encoder, "token_embedder": embedder, "decoder": decoder}


def relpos_bias(module: nnx.Module) -> dict:
    return {"rel_embedding": module.relative_bias.table.embedding[...].T}


def scalable_target(model: T5Encoder, scan: bool) -> dict:
    """Returns the weights as scalable_t5 stores them: split heads; scanned layers on axis 1."""

    def with_heads(path, leaf):
        kind, leaf = path[-2].key, np.asarray(leaf[...])
        heads = (model.config.num_heads, model.config.d_kv)
        if kind in ("query", "key", "value"):
            return leaf.reshape(-1, *heads)
        return leaf.reshape(*heads, -1) if kind == "out" else leaf

    is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
    tree = jax.tree_util.tree_map_with_path(with_heads, target(model), is_leaf=is_param)
    if scan:
        encoder = tree["encoder"]
        layers = [encoder.pop(f"layers_{n}") for n in range(model.config.num_layers)]
        encoder["encoder"] = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *layers)
    return tree


def write_array(folder, name: str, array: np.ndarray) -> dict:
    """Writes a zarr array and returns its entry in T5X's index."""
    metadata = {
        "shape": list(array.shape),
        "chunks": [-(-n // 2) for n in array.shape],
        "compressor": {"id": "gzip", "level": 1},
    }
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    kvstore = {"driver": "file", "path": str(folder / f"target.{name}")}
    tensorstore.open({**spec, "kvstore": kvstore}, create=True).result().write(array).result()
    return {**spec, "kvstore": {"driver": "gfile", "path": f"target.{name}/"}}


def write_t5x(model, folder, dtype=np.float32, placeholders=False, tree=None):
    def leaf(path, value):
        array, name = np.asarray(value[...]).astype(dtype), ".".join(p.key for p in path)
        if array.ndim == 1 and not placeholders:
            return array  # T5X stores unpartitioned arrays in the index
        spec = write_array(folder, name, array)
        return f"PLACEHOLDER://target.{name}" if placeholders else spec

    is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
    index = {
        "target": jax.tree_util.tree_map_with_path(leaf, tree or target(model), is_leaf=is_param)
    }
    if not placeholders:
        index = {"version": 3, "optimizer": {**index, "state": {"step": 7}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))


def random_model(config: T5Config) -> T5Encoder:
    model = T5Encoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)  # initial norms are all ones and would hide mistakes
    state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), nnx.state(model))
    nnx.update(model, state)
    return model


@pytest.mark.parametrize("config", [TINY, V1_0], ids=["v1.1", "v1.0"])
@pytest.mark.parametrize("placeholders", [False, True])
def test_weights_load_unchanged_and_the_shapes_give_the_config(tmp_path, config, placeholders):
    model = random_model(config)
    write_t5x(model, tmp_path, placeholders=placeholders)
    checkpoint = open_t5x(tmp_path)
    assert checkpoint.config == config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(checkpoint.load()), nnx.state(model))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("placeholders", [False, True])
def test_stacked_layers_load_unchanged(tmp_path, scan, placeholders):
    model = random_model(UMT5)
    write_t5x(model, tmp_path, placeholders=placeholders, tree=scalable_target(model, scan))
    assert (tmp_path / "target.encoder.encoder.mlp.wi_0.kernel").is_dir() == scan
    checkpoint = open_t5x(tmp_path)
    assert checkpoint.config == UMT5
    jax.tree.map(np.testing.assert_array_equal, nnx.state(checkpoint.load()), nnx.state(model))


def test_shards_can_split_heads(tmp_path):
    """Three heads on eight devices: no device has a whole head."""
    model = random_model(dataclasses.replace(LARGE, num_heads=3, d_kv=128))
    write_t5x(model, tmp_path, tree=scalable_target(model, scan=True))
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    loaded = open_t5x(tmp_path).load(functools.partial(weight_shardings, mesh))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    joined = JoinedTensor(ArrayTensor(np.arange(2 * 5 * 7 * 3).reshape(2, 5, 7, 3)), 1)
    whole = np.asarray(joined.tensor.array).reshape(2, 35, 3)
    for part in (slice(0, 35), slice(8, 13), slice(6, 22), slice(14, 21), slice(34, 35)):
        index = (slice(1, 2), part, slice(0, 3))
        np.testing.assert_array_equal(joined.read(index), whole[index])


def test_bfloat16_arrays_load_as_float32(tmp_path):
    model = random_model(TINY)
    write_t5x(model, tmp_path, dtype=ml_dtypes.bfloat16)
    expected = jax.tree.map(
        lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), nnx.state(model)
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(open_t5x(tmp_path).load()), expected)


def test_a_checkpoint_loads_onto_a_mesh(tmp_path):
    model = random_model(LARGE)
    write_t5x(model, tmp_path)
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    loaded = open_t5x(tmp_path).load(functools.partial(weight_shardings, mesh))
    kernel = loaded.blocks[0].mlp.down.kernel[...]
    assert {s.data.shape for s in kernel.addressable_shards} == {(64, 256)}
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))


def test_an_encoder_loads_and_its_hash_covers_all_arrays(tmp_path):
    write_t5x(random_model(TINY), tmp_path)  # has ByT5's vocabulary size
    encoder = load_encoder(tmp_path)
    assert encoder.encode(["a red circle"])[0].shape == (13, 16)
    assert encoder.identity["tokenizer"] == "bytes"
    chunk = tmp_path / VALUE / "1.1"
    chunk.write_bytes(chunk.read_bytes() + b"x")
    assert sha256(open_t5x(tmp_path).files) != encoder.identity["weights_sha256"]


@pytest.fixture
def folder(tmp_path):
    write_t5x(random_model(V1_0), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "checkpoint").write_bytes(b"junk"), "not the index of a T5X checkpoint"),
        (lambda f: (f / "checkpoint").write_bytes(b""), "not the index of a T5X checkpoint"),
        (
            lambda f: (f / "checkpoint").write_bytes(serialization.msgpack_serialize({"a": 1})),
            "not the index of a T5X checkpoint",
        ),
        (lambda f: shutil.rmtree(f / VALUE), f"{VALUE}: the index names this array"),
        (lambda f: (f / VALUE / ".zarray").write_text("{"), f"{VALUE}: cannot be read as zarr"),
        (lambda f: (f / VALUE / "1.1").unlink(), f"{VALUE}.*cannot be read"),
        (lambda f: (f / VALUE / "1.1").write_bytes(b"junk"), f"{VALUE}.*cannot be read"),
        (
            lambda f: (
                shutil.rmtree(f / VALUE),
                write_array(f, VALUE[7:], np.ones((16, 24), "u2")),
            ),
            "has dtype uint16; quantized weights are not supported",
        ),
        (
            lambda f: (shutil.rmtree(f / VALUE), write_array(f, VALUE[7:], np.zeros((16, 16)))),
            r"value.kernel' has shape \(16, 16\); its config requires \(16, 24\)",
        ),
    ],
)
def test_damage_is_a_one_line_error(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_t5x(folder).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mlp.wo.kernel", "relpos_bias.rel_embedding"])
def test_a_stacked_array_of_the_wrong_shape_is_a_one_line_error(tmp_path, name):
    model = random_model(UMT5)
    write_t5x(model, tmp_path, tree=scalable_target(model, scan=True))
    shutil.rmtree(tmp_path / f"target.encoder.encoder.{name}")
    write_array(tmp_path, f"encoder.encoder.{name}", np.zeros((4, 1, 16), np.float32))
    with pytest.raises(UserError, match=r"missing|has shape") as error:
        open_t5x(tmp_path).load()
    assert "\n" not in str(error.value)


def test_the_folder_must_hold_a_vocabulary(folder):
    with pytest.raises(UserError, match=r"needs spiece\.model or sentencepiece\.model"):
        load_encoder(folder)


@pytest.mark.parametrize("key", ["shape", "chunks"])
@pytest.mark.parametrize("value", [[10**12, 16], [0, 16], [-5, 16], ["5", 16], 7, [5.0, 16]])
def test_an_array_that_cannot_be_in_its_files_is_refused_before_it_is_opened(folder, key, value):
    path = folder / VALUE / ".zarray"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {key: value}))
    with pytest.raises(UserError, match=rf"\.zarray: {key} is .*; the files can hold at most"):
        open_t5x(folder)
