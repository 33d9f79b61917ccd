"""The Efficient U-Net: what each input affects, scanned blocks, sizes, meshes, config errors."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config
from flax import nnx
from networks import (
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
from imagen_jax.common.typed_config import typed
from imagen_jax.devices import sharding
from imagen_jax.models.efficient_unet import EfficientUNetConfig, ResNetBlock
from imagen_jax.models.networks import functional

TINY = EfficientUNetConfig(
    image_size=8,
    low_res=4,
    cond_width=16,
    widths=(16,),
    num_res_blocks=(2,),
    num_heads=4,
    text_dim=12,
    dtype="float32",
)
VARIANTS = [
    {"widths": (8, 16), "num_res_blocks": (1, 2), "scan_blocks": True},
    {"skip": "add", "self_attention": False},
    {"sequence": "none", "self_attention": False},
]


def tiny(**changes) -> EfficientUNetConfig:
    return dataclasses.replace(TINY, **changes)


def forward(config, state, z, log_snr, cond):
    return compiled(config)(state, z, log_snr, cond)[0]


def test_a_new_model_outputs_float32_zeros_and_its_state_is_float32():
    network = functional(make(TINY))
    params = jit(network.init)(jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(abstract(TINY)[1]))
    z, log_snr, cond = inputs(TINY)
    out = jit(network.apply)(params, z, log_snr, cond)
    assert out.shape == z.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)
    # Stacked blocks are initialized independently, not copied.
    kernel = params["encoder"]["0"]["blocks"]["stacked"]["conv1"]["kernel"]
    assert kernel.shape == (2, 3, 3, 16, 16) and jnp.abs(kernel[0] - kernel[1]).min() > 0
    np.testing.assert_allclose(kernel.std(), (9 * 16) ** -0.5, rtol=0.1)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(changes):
    config = tiny(**changes)
    _, grads = compiled(config)(random_state(config), *inputs(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        # Checks each of the stacked blocks.
        each = leaf if "stacked" in jax.tree_util.keystr(path) else leaf[None]
        assert all(np.any(one) for one in each), jax.tree_util.keystr(path)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_each_input_affects_only_the_output_of_its_own_example(changes):
    config = tiny(**changes)
    state = random_state(config)
    z, log_snr, cond = inputs(config)
    out = forward(config, state, z, log_snr, cond)
    np.testing.assert_array_equal(out, forward(config, state, z, log_snr, with_text(cond, 4)))
    others = [with_text(cond, 1)]
    others += [{**cond, key: cond[key].at[0].add(0.2)} for key in ("low_res", "aug_level")]
    changed = [forward(config, state, z, log_snr, other) for other in others]
    changed.append(forward(config, state, z.at[0].add(0.2), log_snr, cond))
    changed.append(forward(config, state, z, log_snr.at[0].add(0.5), cond))
    for other in changed:
        assert jnp.abs(out[0] - other[0]).max() > 1e-3
        np.testing.assert_array_equal(out[1], other[1])


@pytest.mark.parametrize("changes", VARIANTS[:2], ids=str)
def test_a_caption_without_tokens_is_not_read(changes):
    config = tiny(**changes)
    z, log_snr, cond = inputs(config)
    empty = {**cond, "text_mask": jnp.zeros_like(cond["text_mask"])}
    state = random_state(config)
    out, grads = compiled(config)(state, z, log_snr, empty)
    np.testing.assert_array_equal(out, forward(config, state, z, log_snr, with_text(empty, 0)))
    assert all(np.isfinite(leaf).all() for leaf in [out, *jax.tree.leaves(grads)])


def test_the_network_matches_a_plain_loop_over_the_papers_figures():
    """Runs figures A.28 to A.30; each decoder block takes the skip of its counterpart."""
    config = tiny(**VARIANTS[0])
    graphdef, _ = abstract(config)
    state, (z, log_snr, cond) = random_state(config), inputs(config)

    def blocks(level):
        stacked, params = nnx.split(level.blocks.stacked)
        slices = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(level.blocks.count)]
        return [nnx.merge(stacked, each) for each in slices]

    @jit
    def plain_loop(state):
        net = nnx.merge(graphdef, state)
        conditioning = net.conditioner(log_snr, cond)
        enlarged = jax.image.resize(cond["low_res"], z.shape, "bilinear")
        h, skips = net.stem(jnp.concatenate([z, enlarged], axis=-1)), []
        for level in net.encoder:
            h = level.combine(level.resample(h), conditioning.emb)
            for block in blocks(level):
                h = block(h, None, None)
                skips.append(h)
        h = net.encoder[-1].attention(h, conditioning)
        for level in reversed(net.decoder):
            h = level.combine(h, conditioning.emb)
            for block in reversed(blocks(level)):
                h = block(h, skips.pop(), None)
            if level is net.decoder[-1]:
                h = level.attention(h, conditioning)
            h = level.resample(h)
        return net.head(h)

    expected = plain_loop(state)
    np.testing.assert_allclose(
        forward(config, state, z, log_snr, cond), expected, atol=1e-5 * jnp.abs(expected).max()
    )


def test_skips_are_scaled_by_one_over_the_root_of_two():
    x, skip = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 16))
    block = ResNetBlock(16, tiny(skip="add"), decodes=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(
        block(x, skip, None), block(x + skip / 2**0.5, None, None), atol=1e-6
    )
    block = ResNetBlock(16, tiny(), decodes=True, rngs=nnx.Rngs(0))
    seen = jnp.concatenate([x, skip / 2**0.5], axis=-1)
    np.testing.assert_allclose(block(x, skip, None), block(seen, None, None), atol=1e-6)


def test_the_network_runs_on_images_larger_than_its_training_size():
    config = tiny(image_size=32, low_res=8)
    z, log_snr, cond = inputs(config, scale=2)
    out = jit(nnx.merge(abstract(config)[0], random_state(config)))(z, log_snr, cond)
    assert out.shape == z.shape == (2, 64, 64, 3)
    assert jnp.isfinite(out).all()


def test_scanned_and_unrolled_blocks_agree_on_the_same_parameters():
    unrolled = tiny(**VARIANTS[1])
    scanned = dataclasses.replace(unrolled, scan_blocks=True)
    state, args = random_state(unrolled), inputs(unrolled)
    assert jax.tree.map(jnp.shape, abstract(scanned)[1]) == jax.tree.map(jnp.shape, state)
    (out, grads), (expected, expected_grads) = (
        compiled(config)(state, *args) for config in (scanned, unrolled)
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(grads, expected_grads, 1e-5)


def test_scanned_programs_do_not_grow_with_the_number_of_blocks():
    def lines(config):
        shapes, args = abstract(config), inputs(config)
        lowered = jax.jit(lambda state: nnx.merge(shapes[0], state)(*args)).lower(shapes[1])
        return len(lowered.as_text().splitlines())

    few, many = (tiny(num_res_blocks=(n,), scan_blocks=True) for n in (2, 9))
    assert lines(many) == lines(few)


def test_run_block_gets_every_parameter_and_scanned_blocks_one_at_a_time():
    seen, config = [], tiny(scan_blocks=True)

    def run_block(block, *args):
        _, state = nnx.split(block)
        seen.append(sum(leaf.size for leaf in jax.tree.leaves(state)))
        return block(*args)

    graphdef, state = abstract(config)
    jax.eval_shape(lambda s: nnx.merge(graphdef, s)(*inputs(config), run_block=run_block), state)
    stacked = [
        leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "stacked" in jax.tree_util.keystr(path)
    ]
    repeated = sum(math.prod(shape) - math.prod(shape[1:]) for shape in stacked)
    assert sum(seen) == count(config) - repeated


def test_sharded_weights_and_rematerialized_blocks_give_the_gradients_of_one_device(monkeypatch):
    # By default the weights of a tiny model are too small to shard.
    monkeypatch.setattr("imagen_jax.devices.sharding.MIN_SHARDED_SIZE", 1)
    network = functional(make(TINY))
    state, args = random_state(TINY), inputs(TINY)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))
    runner = sharding.block_runner(mesh, "block", jnp.float32)
    params = string_keys(nnx.to_pure_dict(state))
    placed = jax.device_put(params, sharding.weight_shardings(mesh, params))
    # Repeating the two examples four times leaves the mean gradient unchanged.
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 4), args)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))

    def loss(params):
        return jnp.square(network.apply(params, *batch, run=runner)).mean()

    grads = jax.device_get(jit(jax.grad(loss))(placed))
    expected = compiled(TINY)(state, *args)[1]
    assert_trees_close(grads, string_keys(nnx.to_pure_dict(expected)), 1e-4)


def test_bfloat16_is_close_to_float32():
    state, args = jax.tree.map(lambda x: 0.5 * x, random_state(TINY)), inputs(TINY)
    graphdef, _ = abstract(tiny(dtype="bfloat16"))
    full, half = forward(TINY, state, *args), jit(nnx.merge(graphdef, state))(*args)
    assert half.dtype == jnp.float32
    error = jnp.sqrt(jnp.square(half - full).mean() / jnp.square(full).mean())
    assert 0 < error < 0.05


def test_dropout_differs_by_key():
    graphdef, _ = abstract(tiny(dropout=0.5))
    state, args = random_state(TINY), inputs(TINY)
    run = jit(lambda key, *args: nnx.merge(graphdef, state)(*args, dropout_key=key))
    first, second = (run(key, *args) for key in jax.random.split(jax.random.key(0)))
    without = forward(TINY, state, *args)
    assert jnp.abs(first - without).max() > 1e-3 and jnp.abs(first - second).max() > 1e-3


def shipped(name: str, argument: str | None = None) -> EfficientUNetConfig:
    """Returns the network config of a shipped config."""
    config = load_config(name, argument)
    values = config.model.to_dict()
    assert values.pop("name") == "efficient_unet"
    text = {"text_dim": config.text.dim, "pooling": config.text.pooling}
    return typed(EfficientUNetConfig, values, "model.", sequence=config.text.sequence, **text)


def test_the_paper_configs_have_600_and_400_million_parameters():
    sr256, sr1024 = shipped("sr256"), shipped("sr1024")
    assert count(sr256) == 613_805_699 and sr256 == EfficientUNetConfig()
    assert count(sr1024) == 442_896_515


@pytest.mark.parametrize(
    ("skip", "cond_width", "sr256", "sr1024"),
    [
        ("concat", 2048, 613_805_699, 605_408_899),
        ("concat", 512, 559_127_171, 550_730_371),
        ("add", 2048, 505_971_843, 497_575_043),
        ("add", 512, 451_293_315, 442_896_515),
    ],
)
def test_readings_of_the_paper_have_the_documented_sizes(skip, cond_width, sr256, sr1024):
    config = EfficientUNetConfig(skip=skip, cond_width=cond_width)
    assert count(config) == sr256
    assert count(dataclasses.replace(config, self_attention=False)) == sr1024


@pytest.mark.parametrize("name", ["sr256", "sr1024"])
def test_the_small_siblings_are_small(name):
    assert count(shipped(name, "tiny")) < 2_000_000
    # A loop would make a TPU step a third longer.
    assert not shipped(name).scan_blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 7, "low_res": 7}, "config.model.image_size is 7; allowed: a multiple of 2"),
        ({"widths": ()}, "config.model.widths is (); allowed: a tuple of positive integers"),
        ({"widths": (9,)}, "config.model.widths is (9,); allowed: even numbers"),
        (
            {"num_res_blocks": (0,)},
            "config.model.num_res_blocks is (0,); allowed: a tuple of positive integers",
        ),
        (
            {"num_res_blocks": (2, 2)},
            "config.model.num_res_blocks is (2, 2); allowed: one number for each of the 1 widths",
        ),
        ({"skip": "sum"}, "config.model.skip is 'sum'; allowed: concat | add"),
        (
            {"num_heads": 3},
            "config.model.num_heads is 3; allowed: a divisor of the 32 channels of the attention",
        ),
        (
            {"cond_width": 18},
            "config.model.num_heads is 4; allowed: a divisor of the 18 channels of the text",
        ),
        ({"scan_blocks": 1}, "config.model.scan_blocks is 1; allowed: True | False"),
        ({"low_res": 3}, "config.model.low_res is 3; allowed: 0 or a divisor of image_size, 8"),
    ],
)
def test_a_bad_config_raises_one_line_with_key_value_and_allowed_values(changes, message):
    with pytest.raises(UserError) as error:
        tiny(**changes)
    assert str(error.value) == message
