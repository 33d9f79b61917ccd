"""Several text encoders: concatenated tokens, a projection each; a single one is unaffected."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import FakeEncoder, load_config, shrink, train_run
from flax import nnx
from ml_dtypes import bfloat16
from networks import abstract, inputs, jit, random_state
from PIL import Image

from data_pipelines.embeddings import caption_lists, encoding
from data_pipelines.embeddings.shards import finish
from data_pipelines.embeddings.store import create_store
from data_pipelines.reading.reader import Reader
from imagen_jax import sample
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion.conditioning import pad_text
from imagen_jax.models.efficient_unet import EfficientUNetConfig
from imagen_jax.models.transformer import TransformerConfig
from imagen_jax.models.unet import UNetConfig
from imagen_jax.pipeline import cascade
from imagen_jax.sections import TextConfig
from imagen_jax.stage import Stage
from imagen_jax.text.encoder import Batch

TWO = {"encoder": "byte-tiny+other", "dim": (8, 4), "max_tokens": (6, 7)}
NETWORKS = [
    UNetConfig(8, embed_dim=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,),
               per_head_channels=8, text_dim=12, dtype="float32"),
    EfficientUNetConfig(8, low_res=4, widths=(8, 16), num_res_blocks=(1, 1), cond_width=16,
                        num_heads=2, text_dim=12, dtype="float32"),
    TransformerConfig(8, patch_size=4, width=16, depth=1, head_dim=8, mlp_ratio=1.0, text_dim=12,
                      dtype="float32"),
]  # fmt: skip


def ones(*lengths, dim):
    return [np.ones((n, dim), bfloat16) for n in lengths]


def test_tokens_and_masks_are_concatenated_in_encoder_order():
    text = TextConfig(**TWO)
    assert (text.tokens, text.width) == (13, 8)
    padded = pad_text(text.parts, ones(2, 6, dim=8), ones(7, 1, dim=4))
    assert padded["text"].shape == (2, 13, 8) and padded["text"].dtype == bfloat16
    first, second = padded["text"][:, :6], padded["text"][:, 6:]
    np.testing.assert_array_equal(first[0].sum(1), [8, 8, 0, 0, 0, 0])
    np.testing.assert_array_equal(second[1].sum(1), [4, 0, 0, 0, 0, 0, 0])
    assert not second[:, :, 4:].any()
    np.testing.assert_array_equal(padded["text_mask"], padded["text"].any(2))


def test_an_overlong_embedding_cannot_overwrite_the_next_encoders_tokens():
    with pytest.raises(ValueError, match="broadcast"):
        pad_text(TextConfig(**TWO).parts, ones(7, dim=8), ones(1, dim=4))


@pytest.mark.parametrize(("config", "hidden"), zip(NETWORKS, (0, 1, 0), strict=True), ids=range(3))
def test_masking_one_encoder_equals_using_only_the_other(config, hidden):
    """The text has 5 tokens of width 12; a mask hides 4 tokens of another encoder."""
    z, log_snr, cond = inputs(config)
    parts = ((4, 9), (5, 12)) if hidden == 0 else ((5, 12), (4, 9))
    both_config = dataclasses.replace(config, text_parts=parts)
    # Random weights, because zero-initialized layers would hide the text.
    single, both = random_state(config), random_state(both_config)
    weights, others = nnx.to_pure_dict(single), nnx.to_pure_dict(both)["conditioner"]["text"]
    others[1 - hidden] = weights["conditioner"]["text"]
    weights["conditioner"]["text"] = others
    nnx.replace_by_pure_dict(both, weights)

    def run(config, state, cond):
        return jit(nnx.merge(abstract(config)[0], state).__call__)(z, log_snr, cond)

    def beside(name, other):
        pair = [cond[name], other]
        return jnp.concatenate(pair if hidden == 1 else pair[::-1], axis=1)

    text = beside("text", jnp.full((2, 4, 12), 3.0))
    masked, shown = (
        run(
            both_config,
            both,
            cond | {"text": text, "text_mask": beside("text_mask", jnp.full((2, 4), seen))},
        )
        for seen in (False, True)
    )
    expected = run(config, single, cond)
    np.testing.assert_allclose(masked, expected, atol=1e-4)
    assert np.abs(shown - expected).max() > 1e-3


def test_a_single_encoder_has_one_projection_and_no_parts():
    config = parse(shrink(load_config("demo", "unet")))
    assert config.unet.text_parts == ()
    assert not any("parts" in key for key in config.identity)
    params = Stage(config).abstract_params
    assert set(params["conditioner"]["text"]) == {"kernel"}


def read(**changes):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(build=False)
    values["text"].update(TWO)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return parse(values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text__dim": (8, 4, 2)}, "config.text.dim is (8, 4, 2); allowed: 2 number(s), one per"),
        ({"text__dim": 8}, "config.text.dim is 8; allowed: 2 number(s)"),
        ({"text__max_tokens": [6]}, "config.text.max_tokens is (6,); allowed: 2 number(s)"),
        ({"text__encoder": "byte-tiny"}, "config.text.dim is (8, 4); allowed: 1 number(s)"),
        ({"text__encoder": "byte-tiny+"}, "config.text.encoder is 'byte-tiny+'; allowed: a name"),
        ({"text__dim": (8, 0)}, "config.text.dim is (8, 0); allowed: 1 or more"),
        ({"text__dim": (8, "4")}, "config.text.dim is '4'; it must be of type int"),
        ({"data__build": True}, "config.data.build is True; allowed: false with several text"),
    ],
)
def test_text_keys_that_do_not_fit_are_refused_in_one_line(changes, words):
    with pytest.raises(UserError) as e:
        read(**changes)
    assert words in str(e.value) and "\n" not in str(e.value)


class Encoder(FakeEncoder):
    """A fake encoder with a given name and width, one caption per batch."""

    def __init__(self, name, dim):
        self.dim = dim
        self.identity = {"encoder": name, "dim": dim, "max_tokens": self.max_tokens}

    def encode(self, captions, progress=None):
        return [e[:, : self.dim] for e in super().encode(captions)]

    def batches(self, captions):
        for caption in captions:
            yield Batch(dict(zip([caption], self.encode([caption]), strict=True)), 8)


@pytest.fixture(scope="module")
def encoders():
    return {"byte-tiny": Encoder("byte-tiny", 8), "other": Encoder("other", 4)}


@pytest.fixture(scope="module")
def stores(encoders, tiny_data, tmp_path_factory):
    paths = []
    for name, encoder in encoders.items():
        path = str(tmp_path_factory.mktemp("stores") / name)
        store = create_store(path, encoder.identity, "bfloat16", 1)
        found = caption_lists.read_dataset(tiny_data, "scenes/32")
        encoding.encode(store, encoding.assign(store, found, 0, 1), encoder)
        finish(store)
        paths.append(path)
    return paths


def test_each_encoder_needs_its_own_store(stores, tiny_data):
    with pytest.raises(UserError, match=r"data\.embeddings is ''; allowed: 2 stores joined"):
        Reader(read(data__dir=tiny_data))
    with pytest.raises(UserError, match=r"text\.encoder is 'other' .* have 'byte-tiny'"):
        Reader(read(data__dir=tiny_data, data__embeddings="+".join([stores[0]] * 2)))


def test_records_have_the_embeddings_of_every_store(stores, encoders, tiny_data):
    config = read(data__dir=tiny_data, data__embeddings="+".join(stores))
    for example in Reader(config).training_examples(0, 3):
        for text, encoder in zip(example.texts, encoders.values(), strict=True):
            np.testing.assert_array_equal(text, encoder.encode([example.caption])[0])


def test_training_and_sampling_work_with_two_encoders(
    stores, encoders, tiny_data, tmp_path, monkeypatch
):
    changes = {"data__dir": tiny_data, "data__embeddings": "+".join(stores)}
    values = json.loads(json.dumps(dataclasses.asdict(read(**changes))))
    values.update(num_steps=2, log_every=1, eval_every=0, sample_every=0)
    config = parse(values)
    batch = next(Reader(config).train_batches(0))
    shapes = Stage(config).abstract_batch
    assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in shapes.items()}
    assert batch["text_mask"][:, 6:].any() and batch["text_mask"][:, :6].any()
    train_run(config, tmp_path / "run")
    monkeypatch.setattr(cascade, "load_encoder", lambda name, max_tokens: encoders[name])
    before = set(flags.FLAGS)
    sample.define_flags()
    try:
        with flagsaver.flagsaver():
            out = tmp_path / "out"
            args = [f"--workdir={tmp_path / 'run'}", f"--out={out}", "--prompts=a", "--num=1"]
            flags.FLAGS(["sample", *args])
            sample.main([])
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    assert Image.open(out / "00000.png").size == (32, 32)
