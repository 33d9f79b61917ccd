"""How stages connect: shrinking, crops, noise and order agree in training and sampling."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FakeEncoder, load_config, shrink_sr, train_run
from conftest import shrink as shrink_run
from PIL import Image
from saved_runs import ShortEncoder, random_params

from data_pipelines.reading.reader import Reader
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion import process
from imagen_jax.diffusion.conditioning import (
    pad_text,
    sampling_condition,
    shrink,
    shrink_pixels,
    training_condition,
)
from imagen_jax.pipeline import cascade
from imagen_jax.pipeline.cascade import Cascade
from imagen_jax.pipeline.trained import TrainedStage
from imagen_jax.stage import Stage, load


@pytest.fixture(scope="module")
def stages():
    """A base model of 32 pixels, and super-resolution from 32 to 64."""
    configs = shrink_run(load_config("demo", "unet")), shrink_sr(load_config("sr256", "tiny"))
    loaded = [Stage(parse(c)) for c in configs]
    return [TrainedStage(f"run{i}", 0, s, random_params(s)) for i, s in enumerate(loaded)]


@pytest.fixture
def encoders_loaded(monkeypatch):
    """The arguments with which text encoders are loaded; the encoder itself is a fake one."""
    loaded = []
    monkeypatch.setattr(cascade, "load_encoder", lambda *args: loaded.append(args) or FakeEncoder())
    return loaded


@pytest.fixture
def pipe(stages, encoders_loaded):
    return Cascade(stages)


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_shrinking_a_crop_equals_cropping_the_shrunk_image():
    image = np.random.default_rng(0).random((1, 64, 64, 3))
    small = shrink(image, 16)
    crop = shrink(image[:, 8:40, 12:44], 8)
    np.testing.assert_allclose(crop, small[:, 2:10, 3:11], rtol=1e-12)


def test_crops_are_random_repeatable_and_aligned_to_low_resolution_pixels(tiny_data):
    values = shrink_sr(load_config("sr256", "tiny")).to_dict()
    values["data"].update(dir=tiny_data, task="scenes_32", image_size=32)
    values["model"].update(image_size=16, low_res=4)
    config = parse(values)
    whole = parse(values | {"model": values["model"] | {"image_size": 32, "low_res": 8}})
    crops, again = (next(Reader(config).train_batches(0))["image"] for _ in range(2))
    np.testing.assert_array_equal(crops, again)
    corners = []
    for crop, image in zip(crops, next(Reader(whole).train_batches(0))["image"], strict=True):
        found = [
            (y, x)
            for y in range(0, 17, 4)
            for x in range(0, 17, 4)
            if np.array_equal(image[y : y + 16, x : x + 16], crop)
        ]
        assert found
        corners.append(found)
        y, x = found[0][0] // 4, found[0][1] // 4
        np.testing.assert_array_equal(
            shrink(crop[None].astype(np.float32), 4)[0],
            shrink(image[None].astype(np.float32), 8)[0, y : y + 4, x : x + 4],
        )
    assert len({tuple(c) for c in corners}) > 1
    [row] = Reader(config).examples("heldout", 1)
    assert row["image"].shape == (16, 16, 3)


def test_in_training_each_low_res_image_has_its_own_noise_level():
    x = jnp.full((64, 32, 32, 3), 0.5)
    cond = training_condition(x, 8, jax.random.key(0))
    assert cond["low_res"].shape == (64, 8, 8, 3) and cond["aug_level"].shape == (64,)
    level, spread = np.array(cond["aug_level"]), np.array(cond["low_res"]).std((1, 2, 3))
    assert level.min() < 0.1 and level.max() > 0.9
    assert np.corrcoef(level, spread)[0, 1] > 0.9


def test_sampling_without_augmentation_passes_the_image_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    cond = sampling_condition(image, 0.0, np.arange(2, dtype=np.uint32))
    np.testing.assert_array_equal(process.to_uint8(np.array(cond["low_res"])), image)
    noised = sampling_condition(image, 0.5, np.arange(2, dtype=np.uint32))
    alone = sampling_condition(image[1:], 0.5, np.array([1], np.uint32))
    np.testing.assert_allclose(noised["low_res"][1], alone["low_res"][0], rtol=1e-6)


def test_each_stage_enlarges_the_samples_of_the_one_before(pipe, stages):
    prompts = ["a red circle", "two stars"]
    small, large = pipe(prompts, seed=3, num=2, steps=[2, 3], return_stages=True)
    assert [i.size for i in small] == [(32, 32)] * 4 and [i.size for i in large] == [(64, 64)] * 4
    sr = stages[1]
    text = FakeEncoder().encode(np.repeat(prompts, 2).tolist())
    cond = pad_text(sr.stage.config.text.parts, text) | {"low_res": pixels(small)}
    sampler = dataclasses.replace(sr.stage.config.sampling, num_steps=3)
    again = sr.stage.sample(sr.params, np.array([3, 4, 3, 4], np.uint32), cond, sampler)
    np.testing.assert_array_equal(again, pixels(large))


def test_a_sample_depends_on_its_own_prompt_and_seed_only(pipe):
    several = pipe(["a", "b", "c"], seed=7, batch_size=2)
    np.testing.assert_array_equal(np.asarray(pipe("c", seed=7)[0]), np.asarray(several[2]))
    for other in (pipe("c", seed=8), pipe("d", seed=7), pipe("c", seed=7, sr_prompts="d")):
        assert (pixels(other) != pixels(several[2:])).any()


def test_stages_share_a_text_encoder_that_is_loaded_once(pipe, encoders_loaded):
    assert not encoders_loaded
    for prompt in "ab":
        pipe(prompt)
    assert encoders_loaded == [("byte-tiny", 6)]


def test_a_progress_bar_can_be_turned_off(pipe, capsys):
    pipe("a", progress=False)
    assert capsys.readouterr().err == ""
    pipe("a")
    assert "run1: 100%" in capsys.readouterr().err


def test_long_prompts_are_refused_or_truncated(stages, monkeypatch, caplog):
    monkeypatch.setattr(cascade, "load_encoder", lambda *args: ShortEncoder())
    monkeypatch.setattr(logging.getLogger("imagen_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "imagen_jax")
    base = Cascade(stages[:1])
    with pytest.raises(
        UserError, match=r"^truncate_prompts is needed: prompt 'abcdefgh' has 9 .* 6$"
    ):
        base(["abc", "abcdefgh"])
    for words in ({"negative_prompt": "abcdefgh"}, {"frames": 2}):
        with pytest.raises(UserError, match="'abcdefgh' has 9 tokens"):
            base(["abc", "abcdefgh"] if "frames" in words else "abc", guidance=2, **words)
    images = base(["abc", "abcdefgh"], truncate_prompts=True)
    np.testing.assert_array_equal(pixels(images), pixels(base(["abc", "abcde"])))
    assert [r.getMessage() for r in caplog.records] == [
        "prompt truncated from 9 to 6 tokens: 'abcde'"
    ]


def test_super_resolution_trained_on_crops_samples_whole_images(stages):
    sr = stages[1]
    cond = pad_text(sr.stage.config.text.parts, FakeEncoder().encode(["a"]))
    cond["low_res"] = np.zeros((1, 64, 64, 3), np.uint8)
    samples = sr.stage.sample(sr.params, np.zeros(1, np.uint32), cond)
    assert samples.shape == (1, 128, 128, 3)


def test_nothing_changes_outside_the_mask(pipe):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    small, large = pipe("a", num=2, image=image, mask=mask, resample=1, return_stages=True)
    for sample in pixels(large):
        np.testing.assert_array_equal(sample[:, :32], image[:, :32])
        assert (sample[:, 32:] != image[:, 32:]).any()
    shrunk = shrink_pixels(image[None], 32)[0]
    np.testing.assert_array_equal(pixels(small)[0, :, :16], shrunk[:, :16])


def test_a_small_strength_changes_the_image_little(encoders_loaded):
    image = np.full((32, 32, 3), 40, np.uint8)
    image[:16] = 200
    values = shrink_run(load_config("demo", "unet"))
    values.diffusion.prediction = "eps"  # zero weights predict no noise: z is all image
    stage = Stage(parse(values))
    zeros = jax.tree.map(jnp.zeros_like, random_params(stage))
    base = Cascade([TrainedStage("run", 0, stage, zeros)])

    def changed(strength):
        samples = pixels(base("a", image=image, strength=strength, steps=8))
        return np.abs(samples[0].astype(float) - image).mean()

    assert changed(0.05) < 0.5 * changed(0.9)


def test_the_wrong_order_of_stages_is_a_one_line_error(stages, encoders_loaded):
    message = "^workdir: run0 is a base model, but follows run1, which samples 64 pixels$"
    with pytest.raises(UserError, match=message):
        Cascade(stages[::-1])
    message = "^workdir: run1 enlarges 32 pixels, but follows run1, which samples 64 pixels$"
    with pytest.raises(UserError, match=message):
        Cascade([stages[0], stages[1], stages[1]])
    with pytest.raises(UserError, match=r"^workdir: run1 enlarges 32 pixels, .* give an image"):
        Cascade(stages[1:])("a")
    [enlarged] = Cascade(stages[1:])("a", image=np.zeros((32, 32, 3), np.uint8))
    assert enlarged.size == (64, 64)


def test_super_resolution_trains_writes_grids_and_is_loaded(tiny_data, tmp_path):
    values = shrink_sr(load_config("sr256", "tiny")).to_dict()
    values["data"].update(dir=tiny_data, task="scenes_32", build=False, image_size=0)
    values["model"].update(image_size=32, low_res=8)
    values.update(num_steps=2, log_every=1, eval_every=2, sample_every=2, eval_batches=1)
    config = parse(values)
    train_run(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2]
    width, height = Image.open(tmp_path / "samples" / "step_00000002.png").size
    assert width > 1.5 * height or width > 1000
    stage, params = load(tmp_path)
    assert stage.config.upscale == 4
    jax.tree.map(lambda p, a: (p.shape == a.shape) or 1 / 0, params, stage.abstract_params)
