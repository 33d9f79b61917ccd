"""The base U-Net: shapes, what each input affects, heads, config errors, sizes."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_config
from flax import nnx
from networks import BATCH, abstract, compiled, count, inputs, jit, make, random_state, with_text

from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion import process
from imagen_jax.models.denoiser import add_low_res, with_low_res
from imagen_jax.models.layers import GroupNorm, dropout, num_groups
from imagen_jax.models.networks import build, functional
from imagen_jax.models.unet import UNet, UNetConfig, plan_blocks

TINY = UNetConfig(
    image_size=8,
    embed_dim=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    per_head_channels=8,
    text_dim=12,
    dtype="float32",
)
VARIANTS = [
    {},
    {"pooling": "mean"},
    {"pooling": "none"},
    {"sequence": "cross_attention", "pooling": "none"},
    {"sequence": "none"},
    {"use_scale_shift_norm": False},
    {"decoder_extra_block": True},
    {"low_res": 4, "patch_size": 2, "cond_width": 24},
    {"head": "plain", "patch_size": 2},
]


def tiny(**changes) -> UNetConfig:
    return dataclasses.replace(TINY, **changes)


def forward(config: UNetConfig, state, z, log_snr, cond):
    return compiled(config)(state, z, log_snr, cond)[0]


def test_a_new_model_outputs_float32_zeros_in_the_shape_of_z():
    graphdef, _ = abstract(TINY)
    state = jax.jit(lambda: nnx.state(UNet(TINY, rngs=nnx.Rngs(0))))()
    z, log_snr, cond = inputs(TINY)
    out = jit(lambda state, *args: nnx.merge(graphdef, state)(*args))(state, z, log_snr, cond)
    assert out.shape == z.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)


def test_the_state_is_only_float32_parameters():
    model = nnx.eval_shape(lambda: UNet(tiny(dropout=0.1), rngs=nnx.Rngs(0)))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_only_real_tokens_of_the_text_affect_the_output(changes):
    config = tiny(**changes)
    state = random_state(config)
    z, log_snr, cond = inputs(config)
    out = forward(config, state, z, log_snr, cond)
    padding = forward(config, state, z, log_snr, with_text(cond, token=4))
    np.testing.assert_array_equal(out, padding)
    real = forward(config, state, z, log_snr, with_text(cond, token=1))
    assert jnp.abs(out[0] - real[0]).max() > 1e-3
    np.testing.assert_array_equal(out[1], real[1])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(changes):
    config = tiny(**changes)
    _, grads = compiled(config)(random_state(config), *inputs(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("pooling", ["attention", "mean", "none"])
def test_a_caption_without_tokens_gives_finite_output_and_gradients(pooling):
    config = tiny(pooling=pooling)
    state = random_state(config)
    z, log_snr, cond = inputs(config)
    empty = {**cond, "text_mask": jnp.zeros_like(cond["text_mask"])}
    out, grads = compiled(config)(state, z, log_snr, empty)
    other = forward(config, state, z, log_snr, with_text(empty, token=0))
    np.testing.assert_array_equal(out, other)
    assert all(np.isfinite(leaf).all() for leaf in [out, *jax.tree.leaves(grads)])


def test_the_null_prompt_gives_finite_output_and_gradients():
    """Its embeddings are zero, so the LayerNorm divides by its epsilon."""
    _, log_snr, cond = inputs(TINY)
    z = jnp.zeros((BATCH, 8, 8, 3))
    null = {
        "text": jnp.zeros_like(cond["text"]),
        "text_mask": jnp.zeros_like(cond["text_mask"]).at[:, 0].set(True),
    }
    out, grads = compiled(TINY)(random_state(TINY), z, log_snr, null)
    assert all(np.isfinite(leaf).all() for leaf in [out, *jax.tree.leaves(grads)])
    assert jnp.abs(grads["conditioner"]["text"]["kernel"][...]).max() == 0


def test_the_text_is_not_read_without_pooling_and_sequence():
    config = tiny(pooling="none", sequence="none")
    z, log_snr, _ = inputs(config)
    out = forward(config, random_state(config), z, log_snr, {})
    assert jnp.isfinite(out).all() and jnp.abs(out).max() > 0


def test_layer_norm_makes_attention_invariant_to_the_scale_of_the_text():
    """Without the LayerNorm the same change of scale changes the output."""
    changed = {}
    for sequence in ("cross_attention_layernorm", "cross_attention"):
        config = tiny(pooling="none", sequence=sequence)
        state = random_state(config)
        z, log_snr, cond = inputs(config)
        louder = {**cond, "text": 2.0 * cond["text"]}
        difference = forward(config, state, z, log_snr, cond)
        difference -= forward(config, state, z, log_snr, louder)
        changed[sequence] = float(jnp.abs(difference).max())
    assert changed["cross_attention_layernorm"] < 1e-3 < 1e-2 < changed["cross_attention"]


def test_the_output_depends_on_log_snr_over_its_whole_range():
    state = random_state(TINY)
    z, log_snr, cond = inputs(TINY)
    at = [forward(TINY, state, z, jnp.full_like(log_snr, x), cond) for x in (-20, -5, 0, 5, 20)]
    assert all(jnp.isfinite(out).all() for out in at)
    assert all(jnp.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(at))


def test_the_low_resolution_image_and_its_noise_level_matter_in_a_super_resolution_model():
    config = tiny(low_res=4, patch_size=2, cond_width=24)
    state = random_state(config)
    z, log_snr, cond = inputs(config)
    out = forward(config, state, z, log_snr, cond)
    for key in ("low_res", "aug_level"):
        other = {**cond, key: cond[key].at[0].add(0.2)}
        changed = forward(config, state, z, log_snr, other)
        assert jnp.abs(out[0] - changed[0]).max() > 1e-3
        np.testing.assert_array_equal(out[1], changed[1])


def test_a_constant_low_resolution_image_stays_constant_when_enlarged():
    config = tiny(low_res=4)
    z, _, cond = inputs(config)
    shades = jnp.array([0.25, -0.5])[:, None, None, None]
    joined = with_low_res(z, cond | {"low_res": jnp.broadcast_to(shades, (2, 4, 4, 3))}, config)
    np.testing.assert_array_equal(joined[..., :3], z)
    np.testing.assert_allclose(joined[..., 3:], jnp.broadcast_to(shades, z.shape), rtol=1e-6)
    assert with_low_res(z, {}, TINY) is z


def test_the_low_resolution_skip_is_the_best_linear_estimate_at_every_noise_level():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(0, 0.5, (3, 200, 200, 3)), rng.normal(0, 1, (3, 200, 200, 3))
    levels = np.array([0.0, 0.3, 1.0])
    angles = levels[:, None, None, None] * np.pi / 2
    noised = jnp.asarray(np.cos(angles) * x + np.sin(angles) * noise, jnp.float32)
    cond = {"low_res": noised, "aug_level": jnp.asarray(levels, jnp.float32)}
    skip = add_low_res(jnp.zeros(x.shape), cond, tiny(low_res=4, low_res_skip=True))
    for i in range(3):
        [[best]] = np.linalg.lstsq(np.ravel(noised[i])[:, None], np.ravel(x[i])[:, None])[0]
        np.testing.assert_allclose(skip[i], best * noised[i], atol=0.02)


def test_a_new_network_with_the_skip_returns_the_low_resolution_image():
    network = build(tiny(low_res=4, low_res_skip=True))
    z, log_snr, cond = inputs(tiny(low_res=4))
    cond["aug_level"] = jnp.zeros(len(z))
    out = jax.jit(lambda key: network.apply(network.init(key), z, log_snr, cond))(jax.random.key(0))
    enlarged = jax.image.resize(cond["low_res"], z.shape, "bilinear")
    np.testing.assert_allclose(out, enlarged, atol=1e-6)


def test_examples_of_a_batch_are_independent():
    state = random_state(TINY)
    z, log_snr, cond = inputs(TINY)
    out = forward(TINY, state, z, log_snr, cond)
    other = forward(TINY, state, z.at[0].add(1.0), log_snr.at[0].add(1.0), with_text(cond, 1))
    np.testing.assert_array_equal(out[1], other[1])
    assert jnp.abs(out[0] - other[0]).max() > 1e-3


def test_bfloat16_is_close_to_float32():
    state, args = jax.tree.map(lambda x: 0.5 * x, random_state(TINY)), inputs(TINY)
    graphdef, _ = abstract(tiny(dtype="bfloat16"))
    full, half = forward(TINY, state, *args), jit(nnx.merge(graphdef, state))(*args)
    assert half.dtype == jnp.float32
    error = jnp.sqrt(jnp.square(half - full).mean() / jnp.square(full).mean())
    assert 0 < error < 0.05


def test_every_parameter_is_used_through_run_block():
    """A runner that rematerializes blocks sees every parameter and leaves the output unchanged."""
    seen = []

    def run_block(block, *args):
        graphdef, state = nnx.split(block)
        seen.extend(jax.tree.leaves(state))
        return jax.checkpoint(lambda s, *a: nnx.merge(graphdef, s)(*a))(state, *args)

    graphdef, _ = abstract(TINY)
    state, args = random_state(TINY), inputs(TINY)
    out = jit(lambda s, *a: nnx.merge(graphdef, s)(*a, run_block=run_block))(state, *args)
    np.testing.assert_allclose(out, forward(TINY, state, *args), rtol=1e-4, atol=1e-5)
    assert len(seen) == len(jax.tree.leaves(state))


def test_dropout_needs_a_key_and_differs_by_key():
    graphdef, _ = abstract(tiny(dropout=0.5))
    state, args = random_state(TINY), inputs(TINY)
    run = jit(lambda key, *args: nnx.merge(graphdef, state)(*args, dropout_key=key))
    first, second = (run(key, *args) for key in jax.random.split(jax.random.key(0)))
    without = forward(TINY, state, *args)
    np.testing.assert_allclose(run(None, *args), without, rtol=1e-4, atol=1e-5)
    assert jnp.abs(first - without).max() > 1e-3 and jnp.abs(first - second).max() > 1e-3


def test_dropout_keeps_the_mean_and_drops_the_given_fraction():
    x = jnp.ones((64, 64))
    out = dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    assert abs(float((out == 0).mean()) - 0.25) < 0.03 and abs(float(out.mean()) - 1) < 0.05


def test_group_norm_matches_its_definition_and_film_follows_it():
    rng = np.random.default_rng(0)
    x = 2.0 + rng.standard_normal((2, 4, 4, 16)).astype(np.float32)
    gain, offset = rng.standard_normal((2, 2, 16)).astype(np.float32)
    norm = GroupNorm(16, dtype=jnp.float32)
    grouped = x.reshape(2, 16, norm.groups, -1)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    plain = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    film = plain * (1 + gain[:, None, None, :]) + offset[:, None, None, :]
    np.testing.assert_allclose(norm(jnp.asarray(x)), plain, atol=1e-4)
    modulated = norm(jnp.asarray(x), film=(jnp.asarray(gain), jnp.asarray(offset)))
    np.testing.assert_allclose(modulated, film, atol=1e-4)


def test_groups_divide_the_channels():
    assert [num_groups(c) for c in (3, 16, 48, 64, 512, 2560)] == [1, 4, 12, 16, 32, 32]


@pytest.mark.parametrize("extra", [False, True])
def test_the_decoder_uses_every_saved_skip_and_widths_match(extra):
    config = UNetConfig(decoder_extra_block=extra)
    encoder, middle, decoder = plan_blocks(config)
    saved = [config.embed_dim] if extra else []
    saved += [s.out_channels for s in encoder if s.saves_skip]
    used = [s.skip_channels for s in decoder if s.skip_channels]
    assert saved == used[::-1]
    specs = [*encoder, *middle, *decoder]
    assert all(a.out_channels == b.in_channels for a, b in itertools.pairwise(specs))
    assert sum(s.resample == "down" for s in specs) == sum(s.resample == "up" for s in specs) == 3
    assert sum(s.attends for s in encoder) == 9 and middle[0].attends
    assert len(used) == 4 * (3 + extra)


def test_the_paper_config_has_two_billion_parameters():
    assert count(UNetConfig()) == 1_988_589_571
    assert count(UNetConfig(decoder_extra_block=True)) == 2_263_418_883


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "config.model.image_size is 9; allowed: a multiple of 2"),
        ({"embed_dim": -4}, "config.model.embed_dim is -4; allowed: a positive integer"),
        ({"embed_dim": 15}, "config.model.embed_dim is 15; allowed: an even number"),
        (
            {"channel_mult": ()},
            "config.model.channel_mult is (); allowed: a tuple of positive integers",
        ),
        (
            {"num_res_blocks": 1.5},
            "config.model.num_res_blocks is 1.5; allowed: a positive integer",
        ),
        (
            {"attention_resolutions": (4, 16)},
            "config.model.attention_resolutions is (4, 16); "
            "allowed: a tuple of resolutions among (8, 4)",
        ),
        (
            {"per_head_channels": 64},
            "config.model.per_head_channels is 64; "
            "allowed: a divisor of the 32 channels at resolution 4",
        ),
        (
            {"per_head_channels": 24, "attention_resolutions": ()},
            "config.model.per_head_channels is 24; "
            "allowed: a divisor of the 64 channels of the text",
        ),
        ({"text_dim": None}, "config.model.text_dim is None; allowed: a positive integer"),
        ({"pooling": "max"}, "config.model.pooling is 'max'; allowed: attention | mean | none"),
        (
            {"sequence": "concat"},
            "config.model.sequence is 'concat'; "
            "allowed: cross_attention_layernorm | cross_attention | none",
        ),
        (
            {"use_scale_shift_norm": "no"},
            "config.model.use_scale_shift_norm is 'no'; allowed: True | False",
        ),
        (
            {"low_res_skip": True},
            "config.model.low_res_skip is True; allowed: True only with low_res above 0",
        ),
        ({"low_res": 3}, "config.model.low_res is 3; allowed: 0 or a divisor of image_size, 8"),
        ({"cond_width": -1}, "config.model.cond_width is -1; allowed: 0 or a positive integer"),
        ({"dropout": 1.0}, "config.model.dropout is 1.0; allowed: a number in [0, 1)"),
        (
            {"cond_width": 20},
            "config.model.per_head_channels is 8; "
            "allowed: a divisor of the 20 channels of the text",
        ),
        ({"head": "linear"}, "config.model.head is 'linear'; allowed: norm | plain"),
        ({"dtype": "float16"}, "config.model.dtype is 'float16'; allowed: bfloat16 | float32"),
    ],
)
def test_a_bad_config_raises_one_line_with_key_value_and_allowed_values(changes, message):
    with pytest.raises(UserError) as error:
        tiny(**changes)
    assert str(error.value) == message


def test_the_head_for_x_learns_to_pass_a_clean_image():
    """With the paper's head, the same training leaves an error above 0.012."""
    config = tiny(head="plain", pooling="none", sequence="none", attention_resolutions=())
    network = functional(make(config))
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        keys = jax.random.split(key, 4)
        color = jax.random.uniform(keys[0], (16, 1, 1, 3), minval=-1)
        texture = 0.2 * jax.random.normal(keys[1], (16, 8, 8, 3))
        x = color + jax.random.uniform(keys[2], (16, 1, 1, 1)) * texture
        z = process.q_sample(x, jax.random.normal(keys[3], x.shape), jnp.float32(10))
        return jnp.square(network.apply(params, z, jnp.full(16, 10.0), {}) - x).mean()

    @jit
    def step(params, opt_state, key):
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    params = jit(network.init)(jax.random.key(0))
    opt_state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), 300):
        params, opt_state, value = step(params, opt_state, key)
    assert value < 0.006


@pytest.mark.parametrize(
    ("prediction", "head"), [("eps", "norm"), ("x", "plain"), ("v", "plain"), ("flow", "plain")]
)
def test_the_head_follows_the_prediction(prediction, head):
    values = load_config("demo", "unet")
    values.diffusion.update(prediction=prediction, weighting=prediction, weighting_bias=0.0)
    config = parse(values)
    assert config.unet.head == head


def test_patches_move_the_first_level_to_a_coarser_grid():
    patched = UNetConfig(image_size=64, patch_size=4, attention_resolutions=(8,))
    assert patched.resolutions == (16, 8, 4, 2)
    with pytest.raises(UserError, match="image_size is 20; allowed: a multiple of 32"):
        UNetConfig(image_size=20, patch_size=4, attention_resolutions=())
