"""Each encoder family matches Hugging Face's PyTorch modules, loaded from users' file layouts."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from imagen_jax.text import bert, clip, load_encoder, t5
from imagen_jax.text.hf_format import open_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, VOCAB = 60, 100
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": VOCAB}
V1_1 = {**T5, "feed_forward_proj": "gated-gelu"}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
CLIP = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}


def build(name: str, **sizes):
    config_class = getattr(transformers, name).config_class
    return getattr(transformers, name)(config_class(**sizes))


MODELS = {
    "t5": lambda: build("T5EncoderModel", **T5),
    "t5 v1.1": lambda: build("T5EncoderModel", **V1_1),
    "t5 v1.1 with its decoder": lambda: build("T5ForConditionalGeneration", **V1_1),
    "mt5": lambda: build("MT5EncoderModel", **T5),
    "umt5": lambda: build("UMT5EncoderModel", **T5),
    "umt5 with its decoder": lambda: build("UMT5ForConditionalGeneration", **T5),
    "bert": lambda: build("BertModel", **SIZES),
    "bert with heads": lambda: build("BertForMaskedLM", **SIZES),
    "clip's text tower": lambda: build("CLIPTextModel", **CLIP),
    "clip's text tower, projected": lambda: build("CLIPTextModelWithProjection", **CLIP),
    "clip": lambda: build("CLIPModel", text_config=CLIP, vision_config=VISION),
}


def random_model(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial norms are all ones, which hides mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def expected_outputs(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if "T5" in type(model).__name__:
        model = model.get_encoder()
    elif "CLIP" in type(model).__name__:
        model = getattr(model, "text_model", model)
    else:
        model = model.base_model
    with torch.no_grad():
        out = model(torch.tensor(ids), torch.tensor(mask), output_hidden_states=True)
    penultimate = "CLIP" in type(model).__name__
    return (out.hidden_states[-2] if penultimate else out.last_hidden_state).numpy()


def assert_agrees(model, ours: nnx.Module) -> None:
    ids = np.random.default_rng(0).integers(3, VOCAB, (3, LENGTH))
    for lengths in ([LENGTH] * 3, [LENGTH, 31, 1]):
        mask = np.arange(LENGTH)[None, :] < np.array(lengths)[:, None]
        expected = expected_outputs(model, ids, mask)[mask]
        np.testing.assert_allclose(ours(ids, mask)[mask], expected, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_match_with_and_without_padding(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    assert_agrees(model, open_hf(tmp_path).load())


def save_safetensors(model, folder):
    model.save_pretrained(folder)


def save_sharded_safetensors(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def save_bin(model, folder, **kwargs):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", **kwargs)


def save_legacy_bin(model, folder):
    save_bin(model, folder, _use_new_zipfile_serialization=False)


def save_sharded_bin(model, folder):
    model.config.save_pretrained(folder)
    state = list(model.state_dict().items())
    shards = {f"pytorch_model-{n + 1:05}-of-00003.bin": dict(state[n::3]) for n in range(3)}
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


LAYOUTS = [
    save_safetensors,
    save_sharded_safetensors,
    save_bin,
    save_legacy_bin,
    save_sharded_bin,
]


@pytest.mark.parametrize("name", ["t5", "bert", "clip"])
@pytest.mark.parametrize("save", LAYOUTS)
def test_every_layout_holds_the_same_weights(save, name, tmp_path):
    model = random_model(name)
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    save_safetensors(model, tmp_path / "plain")
    save(model, tmp_path / "other")
    expected, found = (nnx.state(open_hf(tmp_path / f).load()) for f in ("plain", "other"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("save", [save_safetensors, save_bin, save_legacy_bin])
def test_other_dtypes_load_as_float32(save, dtype, tmp_path):
    model = random_model("bert").to(dtype)
    save(model, tmp_path)
    found = open_hf(tmp_path).load().blocks[1].mlp.up.kernel[...]
    expected = model.encoder.layer[1].intermediate.dense.weight.detach().float().numpy().T
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_in_a_bin_file_are_read_correctly(legacy, tmp_path):
    """Weights converted from TensorFlow are stored transposed, or as parts of larger tensors."""
    model = random_model("bert")
    state = model.state_dict()
    name = "encoder.layer.0.intermediate.dense.weight"
    state[name] = state[name].T.contiguous().T
    joined = torch.stack(
        [state[f"encoder.layer.0.attention.self.{n}.bias"] for n in ("key", "value")]
    )
    state["encoder.layer.0.attention.self.key.bias"] = joined[0]
    state["encoder.layer.0.attention.self.value.bias"] = joined[1]
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_agrees(model, open_hf(tmp_path).load())


def test_norms_with_tensorflow_names_are_found(tmp_path):
    model = random_model("bert with heads")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    pattern = re.compile("|".join(map(re.escape, names)))
    state = {pattern.sub(lambda m: names[m[0]], k): v for k, v in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_agrees(model, open_hf(tmp_path).load())


def test_a_bin_file_with_other_objects_is_refused(tmp_path):
    model = random_model("bert")
    model.config.save_pretrained(tmp_path)
    torch.save(model, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"asks to load transformers\..*only plain tensors"):
        open_hf(tmp_path)


def test_byt5_embeddings_match_hugging_face(tmp_path):
    model = build("T5EncoderModel", **{**V1_1, "vocab_size": 384}).eval()
    model.save_pretrained(tmp_path)
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    captions = ["a red circle", "", "naïve 円 🦊"]
    for caption, found in zip(captions, load_encoder(tmp_path).encode(captions), strict=True):
        ids = np.array([tokenizer(caption)["input_ids"]])
        [expected] = expected_outputs(model, ids, np.ones_like(ids))
        np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.02)


def num_params(module, config, depth: str) -> int:
    """Counts parameters from a model with one block, since all blocks have the same size."""
    one = {"num_layers": 1, "num_hidden_layers": 1}[depth] + (module is clip.ClipTextEncoder)
    small = dataclasses.replace(config, **{depth: one})
    model = nnx.eval_shape(lambda: module(small, rngs=nnx.Rngs(0)))
    size, block = (
        sum(x.size for x in jax.tree.leaves(nnx.state(m))) for m in (model, model.blocks)
    )
    return size + (getattr(config, depth) - one) * block


@pytest.mark.parametrize("name", t5.PRESETS)
def test_t5_parameter_counts_match(name):
    config = t5.PRESETS[name]
    with torch.device("meta"):
        kind = "UMT5" if config.bias_in_every_block else "T5"
        theirs = build(f"{kind}EncoderModel", **dataclasses.asdict(config))
    assert num_params(t5.T5Encoder, config, "num_layers") == theirs.num_parameters()


@pytest.mark.parametrize("name", bert.PRESETS)
def test_bert_parameter_counts_match(name):
    config = bert.PRESETS[name]
    with torch.device("meta"):
        theirs = build("BertModel", **dataclasses.asdict(config))
    expected = theirs.num_parameters() - theirs.pooler.dense.weight.numel() - config.dim
    assert num_params(bert.BertEncoder, config, "num_hidden_layers") == expected


@pytest.mark.parametrize("name", clip.PRESETS)
def test_clip_parameter_counts_match_up_to_the_penultimate_layer(name):
    config = clip.PRESETS[name]
    with torch.device("meta"):
        theirs = build("CLIPTextModel", **dataclasses.asdict(config))
    unused = [theirs.encoder.layers[-1], theirs.final_layer_norm]
    expected = theirs.num_parameters() - sum(p.numel() for m in unused for p in m.parameters())
    assert num_params(clip.ClipTextEncoder, config, "num_hidden_layers") == expected
