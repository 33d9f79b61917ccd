"""The T5 encoder: padding, position buckets, and saving and loading folders."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from imagen_jax.common.errors import UserError
from imagen_jax.text.hf_format import CONFIG_FILE, WEIGHTS_FILE, load_t5, save_t5
from imagen_jax.text.t5 import T5Config, T5Encoder, relative_position_bucket

TINY = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=50)
VALUE_OF_BLOCK_1 = "encoder.block.1.layer.0.SelfAttention.v.weight"


def test_padding_does_not_change_the_outputs_at_real_tokens():
    model = T5Encoder(TINY, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(2, 50, (2, 9))
    alone = model(ids, np.ones((2, 9), bool))
    padded_ids = np.concatenate([ids, np.full((2, 7), 33)], axis=1)
    mask = np.arange(16)[None, :] < np.array([[9], [9]])
    np.testing.assert_allclose(model(padded_ids, mask)[:, :9], alone, atol=1e-5)


def test_a_config_without_feed_forward_proj_is_t5_v1_0(folder):
    config = dataclasses.replace(TINY, feed_forward_proj="relu")
    save_t5(T5Encoder(config, rngs=nnx.Rngs(0)), folder, dtype=np.float32, extra={})
    edit_config(folder, lambda c: c.pop("feed_forward_proj"))
    assert load_t5(folder).config == config


def test_token_order_changes_the_outputs():
    model = T5Encoder(TINY, rngs=nnx.Rngs(0))
    mask = np.ones((1, 3), bool)
    forward, backward = model(np.array([[5, 6, 7]]), mask), model(np.array([[7, 6, 5]]), mask)
    assert np.abs(forward[0, 1] - backward[0, 1]).max() > 1e-2


def test_position_buckets_are_exact_when_near_and_logarithmic_when_far():
    offsets = np.array([0, -1, -7, -8, -16, -32, -64, -128, -999, 1, 7, 8, 999])
    kind = {"num_buckets": 32, "max_distance": 128}
    two_sided = relative_position_bucket(offsets, bidirectional=True, **kind)
    assert two_sided.tolist() == [0, 1, 7, 8, 10, 12, 14, 15, 15, 17, 23, 24, 31]
    causal = relative_position_bucket(offsets, bidirectional=False, **kind)
    assert causal.tolist() == [0, 1, 7, 8, 16, 21, 26, 31, 31, 0, 0, 0, 0]


def test_saving_and_loading_keeps_an_encoder_unchanged(tmp_path):
    model = T5Encoder(TINY, rngs=nnx.Rngs(0))
    save_t5(model, tmp_path / "t5", dtype=np.float32, extra={"tokenizer_class": "X"})
    loaded = load_t5(tmp_path / "t5")
    assert loaded.config == TINY
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    assert sorted(p.name for p in (tmp_path / "t5").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_bfloat16_files_load_as_float32(tmp_path):
    model = T5Encoder(TINY, rngs=nnx.Rngs(0))
    save_t5(model, tmp_path, dtype=ml_dtypes.bfloat16, extra={})
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), nnx.state(model))
    loaded = nnx.state(load_t5(tmp_path))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


@pytest.fixture
def folder(tmp_path):
    save_t5(T5Encoder(TINY, rngs=nnx.Rngs(0)), tmp_path, dtype=np.float32, extra={})
    return tmp_path


def edit_tensors(folder, edit):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE)


def edit_config(folder, edit):
    fields = json.loads((folder / CONFIG_FILE).read_text())
    edit(fields)
    (folder / CONFIG_FILE).write_text(json.dumps(fields))


def test_a_decoder_in_the_file_is_ignored(folder):
    edit_tensors(folder, lambda t: t.update({"decoder.final_layer_norm.weight": np.ones(16)}))
    load_t5(folder)


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda t: t.pop(VALUE_OF_BLOCK_1))
    with pytest.raises(UserError, match=f"{VALUE_OF_BLOCK_1}.*missing"):
        load_t5(folder)


def test_a_wrong_shape_is_reported_with_the_expected_one(folder):
    edit_tensors(folder, lambda t: t.update({VALUE_OF_BLOCK_1: np.zeros((16, 17), np.float32)}))
    with pytest.raises(UserError, match=rf"{VALUE_OF_BLOCK_1}.*\(16, 17\).*\(16, 16\)"):
        load_t5(folder)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c.pop("d_kv"), "'d_kv' is missing"),
        (lambda c: c.update(num_layers="two"), "num_layers is 'two'; expected int"),
        (lambda c: c.update(feed_forward_proj="gated-silu"), "feed_forward_proj is 'gated-silu'"),
        (
            lambda c: c.update(model_type="gpt2"),
            "model_type is 'gpt2'; supported: t5, mt5, umt5, bert, clip",
        ),
    ],
)
def test_a_config_of_another_architecture_is_refused(folder, edit, message):
    edit_config(folder, edit)
    with pytest.raises(UserError, match=message):
        load_t5(folder)


def test_missing_and_damaged_files_are_named(folder):
    with pytest.raises(UserError, match=r"nowhere.*config\.json"):
        load_t5(folder / "nowhere")
    (folder / WEIGHTS_FILE).write_bytes(b"not tensors")
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        load_t5(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        load_t5(folder)
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_t5(folder)
