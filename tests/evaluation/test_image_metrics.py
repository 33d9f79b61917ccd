"""The image metrics with a tiny network in place of the published ones."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from imagen_jax.common.errors import UserError
from imagen_jax.devices import sharding
from imagen_jax.evaluation import distances, features, image_metrics, reference
from imagen_jax.evaluation.features import Extractor
from imagen_jax.evaluation.networks import table
from imagen_jax.evaluation.networks.weights import LEAVES, Opened
from imagen_jax.formats.torch import read_torch

DIM = 6
FILE = "tiny.safetensors"


class Tiny:
    """A network of random weights; counts how often the weights are read."""

    loads = 0

    def load(self):
        Tiny.loads += 1
        rng = np.random.default_rng(0)
        weights = {"in": rng.normal(size=(3, 3, 3, 8)), "out": rng.normal(size=(8, DIM))}
        weights = {k: v.astype(np.float32) for k, v in weights.items()}

        def apply(weights, x):
            h = jax.lax.conv_general_dilated(
                x, weights["in"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.tanh(h).mean((1, 2)) @ weights["out"]

        return apply, weights


TINY = dataclasses.replace(
    table.DINOV2, name="tiny", open=lambda _: Tiny(), files={FILE: ""}, size=16, dim=DIM
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of weights for metrics that all use the tiny network."""
    monkeypatch.setattr(image_metrics, "FRECHET_RESAMPLES", 4)
    specs = {
        name: dataclasses.replace(spec, network=TINY)
        for name, spec in image_metrics._SPECS.items()
        if name in image_metrics.WITH_REFERENCE
    }
    monkeypatch.setattr(image_metrics, "_SPECS", specs)
    (tmp_path / FILE).write_bytes(b"tiny")
    Tiny.loads = 0
    return tmp_path


def images(num, seed=0, size=24):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, size, size, 3)).astype(np.uint8)


def examples(num, seed=1):
    return [{"caption": "", "image": image} for image in images(num, seed)]


def save_folder(path, pixels):
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


@pytest.mark.parametrize("num", [1, 11, 40])
def test_one_device_and_eight_agree(num, folder, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 2)  # several batches
    found = Extractor(TINY, "fid", folder)(images(num))
    assert found.shape == (num, DIM) and found.dtype == np.float32
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
    np.testing.assert_allclose(Extractor(TINY, "fid", folder)(images(num)), found, atol=1e-6)


def test_images_are_read_batch_by_batch_and_features_are_remembered(folder, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 1)

    class Lazy:
        sha256, read = "of these images", []

        def __len__(self):
            return 20

        def __getitem__(self, index):
            self.read.append(index)
            return images(20)[index]

    extractor = Extractor(TINY, "fid", folder)
    assert Tiny.loads == 0  # nothing is read before the first image
    found = extractor(Lazy())
    assert sorted(set(Lazy.read)) == list(range(20)) and len(Lazy.read) == 24
    assert extractor(Lazy()) is found and Tiny.loads == 1
    np.testing.assert_array_equal(extractor(images(20)), found)


def test_images_of_two_sizes_are_refused(folder):
    extractor = Extractor(dataclasses.replace(TINY, resize=table.TF1_BILINEAR), "fid", folder)
    with pytest.raises(UserError, match=r"sizes \(8, 8, 3\) and \(9, 9, 3\); they must be equal"):
        extractor([*images(1, size=8), *images(1, size=9)])


def test_every_metric_has_a_row_an_interval_and_a_protocol(folder):
    found = image_metrics.metrics(image_metrics.WITH_REFERENCE, folder)
    for name, metric in found.items():
        assert metric.protocol["weights"] == FILE and "reference" not in metric.protocol
        row = metric.measure(images(40), examples(30))["all"]
        assert row["low"] <= row["value"] <= row["high"] and row["num"] == 40, name
        assert row["low"] < row["high"], name
        assert metric.protocol["reference"]["num"] == 30
        assert metric.protocol["reference"]["how"] == "the examples' own images"
        assert metric.cell(row).endswith("40 samples")
    assert Tiny.loads == 1  # metrics of one network share it


def test_equal_images_have_no_distance(folder):
    own = [{"caption": "", "image": image} for image in images(40)]
    found = image_metrics.metrics(["fid", "cmmd", "precision_recall"], folder)
    rows = {name: m.measure(images(40), own)["all"] for name, m in found.items()}
    assert rows["fid"]["value"] == pytest.approx(0, abs=1e-8)
    assert rows["cmmd"]["value"] == pytest.approx(0, abs=1e-8)
    assert rows["precision_recall"]["value"] == rows["precision_recall"]["recall"] == 1


def test_a_folder_is_the_same_reference_as_its_images(folder):
    pixels = images(30, 1)
    path = save_folder(folder / "photos", pixels)
    own, given = (image_metrics.metrics(["fid", "kid"], folder, source) for source in (None, path))
    prompts = [{"caption": ""}] * 40
    for name in own:
        expected = own[name].measure(images(40), examples(30))["all"]
        assert given[name].measure(images(40), prompts)["all"] == pytest.approx(expected)
    assert "bicubic to 24x24" in given["fid"].protocol["reference"]["how"]


def test_reference_features_are_cached_by_content(folder):
    path = save_folder(folder / "photos", images(8, 1))
    kid = image_metrics.metrics(["kid"], folder, path)["kid"]
    expected = kid.measure(images(9), [])
    [cached] = (folder / "references").iterdir()
    Tiny.loads = 0
    extractor = Extractor(TINY, "fid", folder)
    again = reference.of_images(extractor, reference.ImageFolder(path, 24), "", cached.parent)
    assert Tiny.loads == 0 and again.features.shape == (8, DIM)
    # A cached file is itself a reference, also for metrics that need features.
    given = image_metrics.metrics(["kid"], folder, cached)["kid"]
    assert given.measure(images(9), []) == expected
    cached.write_bytes(b"broken")
    Tiny.loads = 0
    reference.of_images(extractor, reference.ImageFolder(path, 24), "", cached.parent)
    assert Tiny.loads == 1 and reference.read_statistics(cached).features.shape == (8, DIM)
    Image.fromarray(images(1, 2)[0]).save(path / "000.png")
    other = reference.of_images(extractor, reference.ImageFolder(path, 24), "", cached.parent)
    assert other.protocol["sha256"] != again.protocol["sha256"]
    assert len(list(cached.parent.iterdir())) == 2


def test_statistics_of_others_are_read(folder):
    path = folder / "theirs.npz"
    np.savez(path, mu=np.zeros(DIM, np.float32), sigma=np.eye(DIM, dtype=np.float32))
    fid = image_metrics.metrics(["fid"], folder, path)["fid"]
    assert fid.measure(images(9), [{"caption": ""}] * 9)["all"]["value"] > 0
    assert fid.protocol["reference"]["how"] == "statistics in theirs.npz"


def savez(path, **arrays):
    np.savez(path, **arrays)
    return path


# What is wrong with a reference for KID.
REFERENCES = [
    (lambda p: p / "none", "none does not exist; allowed: a folder or a .npz file"),
    (lambda p: save_folder(p / "few", images(2)), "few has 2 images; needed: 4 or more (.bmp,"),
    (lambda p: savez(p / "a.npz", mu=np.zeros(DIM)), "a.npz has no array 'sigma'; needed: mu and"),
    (
        lambda p: savez(p / "b.npz", mu=np.zeros(DIM), sigma=np.eye(3)),
        "b.npz has mu (6,) and sigma (3, 3); needed: [D] and [D, D]",
    ),
    (
        lambda p: savez(p / "c.npz", mu=np.zeros(3), sigma=np.eye(3)),
        "c.npz has 3 features; kid needs 6, of tiny",
    ),
    (
        lambda p: savez(p / "d.npz", mu=np.zeros(DIM), sigma=np.eye(DIM)),
        "d.npz has only mu and sigma; kid needs a folder of images",
    ),
    (
        lambda p: savez(p / "e.npz", mu=np.array([{}]), sigma=np.eye(1)),
        "e.npz cannot be read: Object arrays cannot be loaded when allow_pickle=False",
    ),
    (lambda p: p / FILE, f"{FILE} is not a .npz file; allowed: a folder or a .npz file"),
]


@pytest.mark.parametrize(("make", "words"), REFERENCES)
def test_a_bad_reference_is_named_before_anything_is_sampled(make, words, folder):
    with pytest.raises(UserError, match=re.escape(words)):
        image_metrics.metrics(["kid"], folder, make(folder))


def test_a_broken_reference_image_is_named(folder):
    path = save_folder(folder / "photos", images(5))
    (path / "002.png").write_bytes(b"broken")
    fid = image_metrics.metrics(["fid"], folder, path)["fid"]
    with pytest.raises(UserError, match=r"002.png is not a readable image: cannot identify"):
        fid.measure(images(5), [])


@pytest.mark.parametrize(
    ("name", "num", "words"),
    [
        ("fid", 1, "--metrics=fid needs 2 samples or more; found 1"),
        ("precision_recall", 3, "--metrics=precision_recall needs 4 samples or more; found 3"),
        ("fid", 5, "--metrics=fid needs --reference=FOLDER or FILE.npz, because the prompts"),
    ],
)
def test_too_few_samples_or_no_reference(name, num, words, folder):
    metric = image_metrics.metrics([name], folder)[name]
    with pytest.raises(UserError, match=re.escape(words)):
        metric.measure(images(num), [{"caption": ""}] * num)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fid", "pt_inception-2015-12-05-6726825d.pth"),
        ("cmmd", "clip-vit-large-patch14-336/pytorch_model.bin"),
        ("clip_score", "clip-vit-large-patch14/model.safetensors"),
        ("fd_dinov2", "dinov2-large/model.safetensors"),
    ],
)
def test_missing_weights_say_where_to_get_them_and_where_to_put_them(name, file, tmp_path):
    network = image_metrics._SPECS[name].network
    words = f"--metrics={name} needs {tmp_path / file} (--metric_weights names another folder)"
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        image_metrics.metrics([name], tmp_path)
    assert str(caught.value).endswith(f"get it from {network.source}")


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    missing = dataclasses.replace(table.EFFICIENTNET, package="no_such_package")
    with pytest.raises(UserError, match=r"-e \".\[metrics\]\"$"):
        table.find(missing, "fd_efficientnet", tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    [name, *_] = table.INCEPTION.files
    (tmp_path / name).write_bytes(b"not this one")
    with pytest.raises(UserError, match=r"has SHA-256 .*; --metrics=fid needs 6726825d.*from http"):
        image_metrics.metrics(["fid"], tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros((4, 3), np.float32)}))
    for bias, width, words in (
        (True, 3, "'bias' is missing"),
        (False, 4, "'weight' is float32 (4"),
    ):
        linear = partial(nnx.Linear, width, 4, use_bias=bias)
        with pytest.raises(UserError, match=rf"tensor {re.escape(words)}.* has another network"):
            Opened(path, linear, lambda key: LEAVES[key[-1]])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"--metrics has 'fidd'; allowed: fid, kid, precision_rec"):
        image_metrics.metrics(["fidd"])


def test_real_features_recognize_a_cup_and_rank_distortions():
    """With the ImageNet weights of the extra `metrics`."""
    pytest.importorskip(table.EFFICIENTNET.package)
    data = pytest.importorskip("skimage").data
    extractor = Extractor(table.EFFICIENTNET, "fd_efficientnet")
    weights, whole = read_torch(extractor.path), slice(None)
    kernel, bias = weights["_fc.weight"].read((whole, whole)), weights["_fc.bias"].read((whole,))
    logits = extractor([data.coffee()]) @ kernel.T + bias
    assert np.argmax(logits) == 967  # espresso

    rng, size = np.random.default_rng(0), 128
    pictures = [data.coffee(), data.astronaut(), data.chelsea(), data.rocket()]

    def crop(picture):
        top, left = (rng.integers(n - size) for n in picture.shape[:2])
        return picture[top : top + size, left : left + size]

    own, other = ([crop(p) for p in 2 * pictures] for _ in range(2))
    against = reference.of_images(extractor, other, "")
    found = []
    for noise in (0, 20, 60):
        noisy = np.stack(own) + noise * rng.normal(size=(8, size, size, 3))
        features = extractor(noisy.clip(0, 255).astype(np.uint8))
        found += distances.frechet_of_draws(features, against.moments, [np.arange(8)])
    assert 1.1 * found[0] < found[1] and 1.1 * found[1] < found[2]
