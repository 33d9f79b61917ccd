"""The transformer: a NumPy reference, what each input affects, positions, loops, meshes, sizes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_config
from flax import nnx
from networks import (
    BATCH,
    abstract,
    assert_trees_close,
    compiled,
    count,
    inputs,
    jit,
    make,
    random_state,
    string_keys,
    with_text,
)

from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.devices import sharding
from imagen_jax.diffusion import process
from imagen_jax.models.denoiser import with_low_res
from imagen_jax.models.networks import functional
from imagen_jax.models.token_layers import absolute_positions, no_rotations, rotate, rotations
from imagen_jax.models.transformer import TransformerConfig

TINY = TransformerConfig(
    image_size=8,
    patch_size=4,
    width=16,
    depth=1,
    head_dim=8,
    mlp_ratio=1.5,
    text_dim=12,
    dtype="float32",
)
VARIANTS = [
    {"bottleneck": 6, "depth": 2},
    {"text_tokens": "keys", "cond_width": 24, "low_res": 4},
    {"sequence": "cross_attention", "pooling": "none"},
    {"text_tokens": "keys", "text_patch_size": 2},
    {"sequence": "none", "pooling": "mean"},
]


def tiny(**changes) -> TransformerConfig:
    return dataclasses.replace(TINY, **changes)


def forward(config, state, z, log_snr, cond):
    return compiled(config)(state, z, log_snr, cond)[0]


def reference(config, state, z, log_snr, cond):
    """The network in float64, one example and one head at a time, without padded tokens.

    Only the conditioner is the network's own.
    """
    conditioner = nnx.merge(abstract(config)[0], state).conditioner
    conditioning = jit(conditioner.__call__)(log_snr, cond)
    weights = jax.tree.map(np.float64, nnx.to_pure_dict(state))
    images = np.float64(with_low_res(z, cond, config))
    p, d, side = config.patch_size, config.head_dim, config.image_size // config.patch_size
    grid = [(row, column) for row in range(side) for column in range(side)]

    def dense(w, x):
        return x @ w["kernel"] + w.get("bias", 0)

    def norm(w, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w["scale"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def turned(x):
        """Rotates the patches' channels as complex numbers; the text that follows stays."""
        speeds = 10_000.0 ** -(np.arange(d // 4) / (d // 4))
        turns = np.exp(1j * np.array([[*(r * speeds), *(c * speeds)] for r, c in grid]))
        pairs = x[:, : d // 2] + 1j * x[:, d // 2 :]
        pairs[: len(grid)] *= turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def attention(w, x, text):
        q, k, v = (dense(w[name], x) for name in "qkv")
        heads = []
        for head in range(config.width // d):
            part = slice(head * d, (head + 1) * d)
            keys, values = turned(norm(w["k_norm"], k[:, part])), v[:, part]
            if text is not None:
                extra = norm(w["k_norm"], dense(w["text_k"], text)[:, part])
                keys = np.concatenate([keys, extra])
                values = np.concatenate([values, dense(w["text_v"], text)[:, part]])
            logits = turned(norm(w["q_norm"], q[:, part])) @ keys.T / np.sqrt(d)
            heads.append(softmax(logits) @ values)
        return dense(w["out"], np.concatenate(heads, axis=-1))

    out = np.zeros((*images.shape[:3], config.channels))
    for b, image in enumerate(images):
        squares = [(slice(p * r, p * r + p), slice(p * c, p * c + p)) for r, c in grid]
        h = np.stack([image[square].ravel() for square in squares])
        w = weights["patches"]
        h = dense(w["out"], dense(w["squeeze"], h) if config.bottleneck else h)
        if not config.low_res:
            speeds = 10_000.0 ** -(np.arange(config.width // 4) / (config.width // 4))
            for i, position in enumerate(grid):
                h[i] += np.concatenate([f(x * speeds) for x in position for f in (np.cos, np.sin)])
        extra = None
        if config.sequence != "none":
            text = np.float64(conditioning.text[b][conditioning.text_mask[b]])
            w = weights["text"]
            if config.sequence == "cross_attention_layernorm":
                text = (text - text.mean(-1, keepdims=True)) / np.sqrt(
                    text.var(-1, keepdims=True) + 1e-6
                )
                text = text * w["norm"]["scale"] + w["norm"]["bias"]
            filled = np.zeros((-len(text) % config.text_patch_size, text.shape[-1]))
            text = np.concatenate([text, filled])
            text = dense(w["out"], text.reshape(-1, config.text_patch_size * text.shape[-1]))
            extra = text if config.text_tokens == "keys" else None
            h = h if config.text_tokens == "keys" else np.concatenate([h, text])
        emb = silu(np.float64(conditioning.emb[b]))
        for i in range(config.depth):
            w = weights["blocks"][i]
            parts = np.split(dense(w["modulation"]["linear"], emb), 6)
            x = norm(w["norm1"], h) * (1 + parts[1]) + parts[0]
            h = h + parts[2] * attention(w["attention"], x, extra)
            x = norm(w["norm2"], h) * (1 + parts[4]) + parts[3]
            x = silu(dense(w["mlp"]["gate"], x)) * dense(w["mlp"]["up"], x)
            h = h + parts[5] * dense(w["mlp"]["down"], x)
        w = weights["head"]
        shift, scale = np.split(dense(w["modulation"]["linear"], emb), 2)
        h = dense(w["out"], norm(w["norm"], h[: len(grid)]) * (1 + scale) + shift)
        for values, square in zip(h, squares, strict=True):
            out[b][square] = values.reshape(p, p, config.channels)
    return out


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_network_matches_a_reference_in_numpy(changes):
    config = tiny(**changes)
    state, args = jax.tree.map(lambda x: 0.5 * x, random_state(config)), inputs(config)
    expected = reference(config, state, *args)
    assert_trees_close(forward(config, state, *args), expected, 1e-5)
    assert expected.std() > 1e-3


def test_a_new_model_outputs_float32_zeros_and_its_state_is_float32():
    network = functional(make(TINY))
    params = jit(network.init)(jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    z, log_snr, cond = inputs(TINY)
    out = jit(network.apply)(params, z, log_snr, cond)
    assert out.shape == z.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(changes):
    config = tiny(**changes)
    _, grads = compiled(config)(random_state(config), *inputs(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_each_input_affects_only_the_output_of_its_own_example(changes):
    config = tiny(**changes)
    state, (z, log_snr, cond) = random_state(config), inputs(config)
    out = forward(config, state, z, log_snr, cond)
    padding = forward(config, state, z, log_snr, with_text(cond, 4))
    np.testing.assert_array_equal(out, padding)
    others = [(z, log_snr, with_text(cond, 1)), (z.at[0].add(0.2), log_snr, cond)]
    others.append((z, log_snr.at[0].add(0.5), cond))
    if config.low_res:
        changed = ({**cond, key: cond[key].at[0].add(0.2)} for key in ("low_res", "aug_level"))
        others += [(z, log_snr, each) for each in changed]
    for other in others:
        changed = forward(config, state, *other)
        assert jnp.abs(out[0] - changed[0]).max() > 1e-3
        np.testing.assert_array_equal(out[1], changed[1])


@pytest.mark.parametrize("changes", VARIANTS[:4], ids=str)
def test_without_text_tokens_the_text_is_not_read(changes):
    config = tiny(**changes)
    state, (z, log_snr, cond) = random_state(config), inputs(config)
    empty = {**cond, "text_mask": jnp.zeros_like(cond["text_mask"])}
    out, grads = compiled(config)(state, z, log_snr, empty)
    np.testing.assert_array_equal(out, forward(config, state, z, log_snr, with_text(empty, 0)))
    assert all(np.isfinite(leaf).all() for leaf in [out, *jax.tree.leaves(grads)])


@pytest.mark.parametrize("changes", VARIANTS[:4], ids=str)
def test_the_null_prompt_trains_its_tokens_and_not_the_projection(changes):
    config = tiny(**changes)
    z, log_snr, cond = inputs(config)
    null = {
        **cond,
        "text": jnp.zeros_like(cond["text"]),
        "text_mask": jnp.zeros_like(cond["text_mask"]).at[:, 0].set(True),
    }
    out, grads = compiled(config)(random_state(config), z, log_snr, null)
    assert all(np.isfinite(leaf).all() for leaf in [out, *jax.tree.leaves(grads)])
    assert jnp.abs(grads["conditioner"]["text"]["kernel"][...]).max() == 0
    assert jnp.abs(grads["text"]["out"]["bias"][...]).max() > 0


def test_products_of_rotated_queries_and_keys_depend_on_the_offset_of_their_patches():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    at = rotations(6, 6, 16)
    q, k = (rotate(jnp.broadcast_to(x, (1, 36, 1, 16)), at[None])[0, :, 0] for x in (q, k))
    logits = (q @ k.T).reshape(6, 6, 6, 6)
    np.testing.assert_allclose(logits[0, 1, 2, 4], logits[3, 2, 5, 5], rtol=1e-4)
    for other in (logits[0, 1, 3, 4], logits[0, 1, 2, 5], logits[2, 4, 0, 1]):
        assert abs(other - logits[0, 1, 2, 4]) > 1e-2
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), jnp.linalg.norm(q[0]), rtol=1e-5)


def test_a_token_without_a_position_is_not_rotated():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    np.testing.assert_array_equal(rotate(x, no_rotations(3, 8)[None]), x)


def test_absolute_positions_differ_by_row_and_by_column():
    table = absolute_positions(3, 5, 16)
    assert len(np.unique(table.round(4), axis=0)) == 15


@pytest.mark.parametrize("low_res", [0, 4])
def test_only_a_network_without_low_res_knows_where_a_patch_is(low_res):
    config = tiny(low_res=low_res, sequence="none")
    _, log_snr, cond = inputs(tiny(low_res=4))
    cond["low_res"] = jnp.full((BATCH, 4, 4, 3), 0.3)
    network = nnx.merge(abstract(config)[0], random_state(config))
    out = jit(network.__call__)(jnp.full((BATCH, 8, 8, 3), 0.5), log_snr, cond)
    patches = out.reshape(BATCH, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(BATCH, 4, -1)
    assert (patches.std(1).max() < 1e-4) == bool(low_res)


def test_the_network_runs_on_larger_images_that_are_not_square():
    config = tiny(low_res=4)
    z, log_snr, cond = inputs(config, scale=2)
    z, cond["low_res"] = z[:, :12], cond["low_res"][:, :6]
    out = jit(nnx.merge(abstract(config)[0], random_state(config)))(z, log_snr, cond)
    assert out.shape == z.shape == (2, 12, 16, 3)
    assert jnp.isfinite(out).all()


def test_scanned_and_unrolled_blocks_agree_on_the_same_parameters():
    unrolled = tiny(**VARIANTS[0])
    scanned = dataclasses.replace(unrolled, scan_blocks=True)
    state, args = random_state(unrolled), inputs(unrolled)
    assert jax.tree.map(jnp.shape, abstract(scanned)[1]) == jax.tree.map(jnp.shape, state)
    assert_trees_close(compiled(scanned)(state, *args), compiled(unrolled)(state, *args), 1e-5)


def test_scanned_programs_grow_only_by_the_stacking_of_parameters():
    def loops_and_products(depth):
        config = tiny(depth=depth, scan_blocks=True)
        graphdef, state = abstract(config)
        call = jax.jit(lambda state: nnx.merge(graphdef, state)(*inputs(config)))
        text = call.lower(state).as_text()
        return text.count("stablehlo.while"), text.count("dot_general")

    assert loops_and_products(2) == loops_and_products(5) and loops_and_products(2)[0] == 1


@pytest.mark.parametrize("scan", [False, True])
def test_run_block_gets_every_parameter_and_scanned_blocks_one_at_a_time(scan):
    seen, config = [], tiny(scan_blocks=scan, low_res=4, depth=2)

    def run_block(block, *args):
        seen.append(sum(leaf.size for leaf in jax.tree.leaves(nnx.split(block)[1])))
        for leaf in jax.tree.leaves(args):
            assert leaf.shape[0] == BATCH
        return block(*args)

    graphdef, state = abstract(config)
    jax.eval_shape(lambda s: nnx.merge(graphdef, s)(*inputs(config), run_block=run_block), state)
    repeated = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["blocks"][0]))
    assert sum(seen) == count(config) - (repeated if scan else 0)


def test_sharded_weights_and_rematerialized_blocks_give_the_gradients_of_one_device(monkeypatch):
    # By default the weights of a tiny model are too small to shard.
    monkeypatch.setattr("imagen_jax.devices.sharding.MIN_SHARDED_SIZE", 1)
    config = tiny(**VARIANTS[0])
    network = functional(make(config))
    state, args = random_state(config), inputs(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    runner = sharding.block_runner(mesh, "save_products", jnp.float32)
    params = string_keys(nnx.to_pure_dict(state))
    placed = jax.device_put(params, sharding.weight_shardings(mesh, params))
    # Repeating the two examples twice leaves the mean gradient unchanged.
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 2), args)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    used = {axis for x in jax.tree.leaves(placed) for axis in x.sharding.spec}
    assert {"fsdp", "tensor"} <= used

    def loss(params):
        return jnp.square(network.apply(params, *batch, run=runner)).mean()

    grads = jax.device_get(jit(jax.grad(loss))(placed))
    expected = compiled(config)(state, *args)[1]
    assert_trees_close(grads, string_keys(nnx.to_pure_dict(expected)), 1e-4)


def test_save_products_recomputes_no_product_but_the_logits():
    mesh = sharding.make_mesh(sharding.MeshConfig())
    config = tiny(text_tokens="keys", depth=2)
    network, (state, args) = functional(make(config)), (random_state(config), inputs(config))
    params = string_keys(nnx.to_pure_dict(state))

    def blocks(remat):
        runner = sharding.block_runner(mesh, remat, jnp.float32)

        def run(fn, params, *arrays):
            # Only blocks; the conditioner and the other parts run once and are small.
            each = runner if "attention" in params else sharding.block_runner(mesh, "none", None)
            return each(fn, params, *arrays)

        def loss(params):
            return jnp.square(network.apply(params, *args, run=run)).mean()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    none, saved, recomputed = (blocks(remat) for remat in ("none", "save_products", "block"))
    assert saved == none + config.depth
    # The modulation, q, k, v, the text's k and v, out, gate and up; down is not needed again.
    assert recomputed >= none + 9 * config.depth


def test_bfloat16_is_close_to_float32():
    config = tiny(**VARIANTS[0])
    state, args = jax.tree.map(lambda x: 0.5 * x, random_state(config)), inputs(config)
    graphdef, _ = abstract(dataclasses.replace(config, dtype="bfloat16"))
    full, half = forward(config, state, *args), jit(nnx.merge(graphdef, state))(*args)
    assert half.dtype == jnp.float32
    error = jnp.sqrt(jnp.square(half - full).mean() / jnp.square(full).mean())
    assert 0 < error < 0.05


def test_dropout_differs_by_key():
    config = tiny(**VARIANTS[4])
    graphdef, _ = abstract(dataclasses.replace(config, dropout=0.5))
    state, args = random_state(config), inputs(config)
    run = jit(lambda key, *args: nnx.merge(graphdef, state)(*args, dropout_key=key))
    first, second = (run(key, *args) for key in jax.random.split(jax.random.key(0)))
    without = forward(config, state, *args)
    assert jnp.abs(first - without).max() > 1e-3 and jnp.abs(first - second).max() > 1e-3


@pytest.mark.slow
def test_the_network_learns_to_pass_a_clean_image():
    changes = {"image_size": 4, "patch_size": 2, "width": 32, "depth": 1}
    config = tiny(**changes, pooling="none", sequence="none")
    network = functional(make(config))
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        x_key, eps_key = jax.random.split(key)
        x = jax.random.uniform(x_key, (16, 4, 4, 3), minval=-1)
        z = process.q_sample(x, jax.random.normal(eps_key, x.shape), jnp.float32(10))
        return jnp.square(network.apply(params, z, jnp.full(16, 10.0), {}) - x).mean()

    @jit
    def step(params, opt_state, key):
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    params = jit(network.init)(jax.random.key(0))
    opt_state, values = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), 200):
        params, opt_state, value = step(params, opt_state, key)
        values.append(float(value))
    assert values[0] > 0.3 and values[-1] < 0.006


def size(config: TransformerConfig) -> int:
    """Counts the parameters of a deep network, whose blocks are all equal, from shallow ones."""
    one, two = (count(dataclasses.replace(config, depth=depth)) for depth in (1, 2))
    return one + (config.depth - 1) * (two - one)


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("transformer64", "2b", 1_956_237_360),
        ("transformer64", "1b", 1_012_562_992),
        ("transformer64", "300m", 292_155_952),
        ("transformer256", "2b", 1_958_335_232),
        ("transformer256", "1b", 1_014_185_728),
        ("transformer256", "300m", 293_303_552),
    ],
)
def test_the_shipped_configs_have_the_documented_sizes(name, argument, expected):
    config = parse(load_config(name, argument)).unet
    assert size(config) == expected
    assert (config.image_size // config.patch_size) ** 2 == 256


def test_the_small_sibling_is_small_and_the_default_is_the_shipped_config():
    assert size(parse(load_config("transformer64", "tiny")).unet) < 3_000_000
    assert parse(load_config("transformer64")).unet == TransformerConfig()
    with pytest.raises(ValueError, match="argument 'tiny'; allowed: 2b, 1b, 300m"):
        load_config("transformer256", "tiny")


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_any_prediction_can_be_configured(prediction):
    config = load_config("transformer64", "tiny")
    config.diffusion.prediction = prediction
    assert parse(config).identity["diffusion.prediction"] == prediction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "image_size is 9; allowed: a multiple of the patch size, 4"),
        ({"patch_size": 0}, "patch_size is 0; allowed: a positive integer"),
        ({"depth": 0}, "depth is 0; allowed: a positive integer"),
        ({"head_dim": 6}, "head_dim is 6; allowed: a multiple of 4"),
        ({"head_dim": 12}, "head_dim is 12; allowed: a divisor of the 16 channels of a token"),
        ({"cond_width": 20}, "head_dim is 8; allowed: a divisor of the 20 channels of the text"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0; allowed: above 0"),
        ({"mlp_ratio": "3"}, "mlp_ratio is '3'; allowed: above 0"),
        ({"bottleneck": -1}, "bottleneck is -1; allowed: 0 or a positive integer"),
        ({"text_tokens": "all"}, "text_tokens is 'all'; allowed: sequence | keys"),
        ({"scan_blocks": 1}, "scan_blocks is 1; allowed: True | False"),
        ({"low_res": 3}, "low_res is 3; allowed: 0 or a divisor of image_size, 8"),
    ],
)
def test_a_bad_config_raises_one_line_with_key_value_and_allowed_values(changes, message):
    with pytest.raises(UserError) as error:
        tiny(**changes)
    assert str(error.value) == f"config.model.{message}"
