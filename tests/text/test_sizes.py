"""Exact parameter counts of all presets; padding and causality of BERT and CLIP."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from imagen_jax.text import bert, clip, t5
from imagen_jax.text.bert import BertConfig, BertEncoder
from imagen_jax.text.clip import ClipConfig, ClipTextEncoder
from imagen_jax.text.t5 import T5Encoder

# Encoders only, without decoder or pooler; CLIP up to its penultimate layer.
SIZES = {
    "byte-tiny": 1_033_984,
    "t5-small": 35_330_816,
    "t5-base": 109_628_544,
    "t5-large": 334_939_648,
    "t5-3b": 1_240_909_824,
    "t5-11b": 4_864_791_552,
    "t5-v1_1-small": 35_332_800,
    "t5-v1_1-base": 109_628_544,
    "t5-v1_1-large": 341_231_104,
    "t5-v1_1-xl": 1_223_527_424,
    "t5-v1_1-xxl": 4_762_310_656,
    "mt5-small": 146_940_608,
    "mt5-base": 277_040_256,
    "mt5-large": 564_446_720,
    "mt5-xl": 1_669_958_656,
    "mt5-xxl": 5_655_173_120,
    "umt5-small": 150_153_216,
    "umt5-base": 281_861_376,
    "umt5-large": 570_881_024,
    "umt5-xl": 1_682_827_264,
    "umt5-xxl": 5_680_910_336,
    "byt5-small": 217_657_472,
    "byt5-base": 414_703_488,
    "byt5-large": 864_204_800,
    "byt5-xl": 2_614_091_264,
    "byt5-xxl": 8_990_317_632,
    "bert-base": 108_891_648,
    "bert-large": 334_092_288,
    "clip-vit-large-patch14": 115_971_072,
}
FAMILIES = [
    (t5.PRESETS, T5Encoder, {"num_layers": 1}),
    (bert.PRESETS, BertEncoder, {"num_hidden_layers": 1}),
    (clip.PRESETS, ClipTextEncoder, {"num_hidden_layers": 2}),  # CLIP omits the last one
]
PRESETS = [(n, c, m, one) for presets, m, one in FAMILIES for n, c in presets.items()]


def size(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(module)))


def abstract(module: type[nnx.Module], config) -> nnx.Module:
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))


def test_xxl_has_the_published_number_of_parameters():
    assert size(abstract(T5Encoder, t5.PRESETS["t5-v1_1-xxl"])) == SIZES["t5-v1_1-xxl"]


@pytest.mark.parametrize("name, config, module, one", PRESETS, ids=[p[0] for p in PRESETS])
def test_every_preset_has_its_exact_number_of_parameters(name, config, module, one):
    """Builds one block, to save time, because all blocks have the same size."""
    [(depth, smallest)] = one.items()
    model = abstract(module, dataclasses.replace(config, **one))
    more = getattr(config, depth) - smallest
    assert size(model) + more * size(model.blocks) == SIZES[name]


SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 50}


@pytest.mark.parametrize(
    "model",
    [
        BertEncoder(BertConfig(num_hidden_layers=1, **SMALL), rngs=nnx.Rngs(0)),
        ClipTextEncoder(ClipConfig(num_hidden_layers=2, **SMALL), rngs=nnx.Rngs(0)),
    ],
    ids=["bert", "clip"],
)
def test_padding_does_not_change_the_outputs_at_real_tokens(model):
    ids = np.random.default_rng(0).integers(2, 50, (2, 9))
    alone = model(ids, np.ones((2, 9), bool))
    padded_ids = np.concatenate([ids, np.full((2, 7), 33)], axis=1)
    mask = np.arange(16)[None, :] < np.array([[9], [9]])
    np.testing.assert_allclose(model(padded_ids, mask)[:, :9], alone, atol=1e-5)


def test_only_clip_is_causal():
    ids = np.array([[5, 6, 7]])
    for module, config, causal in [
        (BertEncoder, BertConfig(num_hidden_layers=1, **SMALL), False),
        (ClipTextEncoder, ClipConfig(num_hidden_layers=2, **SMALL), True),
    ]:
        model = module(config, rngs=nnx.Rngs(0))
        first, other = (model(np.array([[5, 6, last]]), np.ones_like(ids)) for last in (7, 8))
        assert (np.abs(first[0, :2] - other[0, :2]).max() < 1e-6) == causal
