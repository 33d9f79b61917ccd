"""What joins the stages: shrinking, crops, noise and order agree in training and sampling."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, random_batch, shrink_sr, train_run
from conftest import shrink as shrink_run
from PIL import Image

from data_pipelines.reading.reader import Reader
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion import process
from imagen_jax.diffusion.conditioning import (
    sampling_condition,
    shrink,
    shrink_pixels,
    training_condition,
)
from imagen_jax.pipeline import cascade
from imagen_jax.stage import Stage, load


def stages_of(*configs):
    stages = [Stage(parse(c)) for c in configs]
    return [
        cascade.Stage(str(i), 0, b, b.init().ema, b.config.sampling, batch_size=8)
        for i, b in enumerate(stages)
    ]


@pytest.fixture(scope="module")
def stages():
    """An untrained cascade, 32 -> 64."""
    base, sr = shrink_run(load_config("demo")), shrink_sr(load_config("sr256", "tiny"))
    return stages_of(base, sr)


def test_shrinking_a_crop_is_cropping_the_shrunk_image():
    image = np.random.default_rng(0).random((1, 64, 64, 3))
    small = shrink(image, 16)
    crop = shrink(image[:, 8:40, 12:44], 8)
    np.testing.assert_allclose(crop, small[:, 2:10, 3:11], rtol=1e-12)


def test_crops_lie_on_low_resolution_pixels_and_are_random_but_repeatable(tiny_data):
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


def test_the_training_condition_is_noised_by_its_own_level():
    x = jnp.full((64, 32, 32, 3), 0.5)
    cond = training_condition(x, 8, jax.random.key(0))
    assert cond["low_res"].shape == (64, 8, 8, 3) and cond["aug_level"].shape == (64,)
    level, spread = np.array(cond["aug_level"]), np.array(cond["low_res"]).std((1, 2, 3))
    assert level.min() < 0.1 and level.max() > 0.9
    assert np.corrcoef(level, spread)[0, 1] > 0.9


def test_sampling_without_augmentation_shows_the_image_itself():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    cond = sampling_condition(pixels, 0.0, np.arange(2, dtype=np.uint32))
    np.testing.assert_array_equal(process.to_uint8(np.array(cond["low_res"])), pixels)
    noised = sampling_condition(pixels, 0.5, np.arange(2, dtype=np.uint32))
    alone = sampling_condition(pixels[1:], 0.5, np.array([1], np.uint32))
    np.testing.assert_allclose(noised["low_res"][1], alone["low_res"][0], rtol=1e-6)


def cond_of(stages, num):
    config = dataclasses.replace(stages[0].stage.config, batch_size=num)
    batch = random_batch(config)
    return [{k: batch[k] for k in ("text", "text_mask")}] * len(stages)


def test_each_stage_enlarges_what_the_one_before_drew(stages):
    cascade.check_order(stages)
    conds, told = cond_of(stages, 3), []
    seeds = np.arange(3, dtype=np.uint32)
    small, large = cascade.draw(
        stages, seeds, conds, progress=lambda s, n: told.append((s.name, n))
    )
    assert small.shape == (3, 32, 32, 3) and large.shape == (3, 64, 64, 3)
    assert told == [("0", 3), ("1", 3)]
    given = conds[1] | {"low_res": small}
    again = stages[1].stage.sample(stages[1].params, seeds, given, stages[1].sampler)
    np.testing.assert_array_equal(again, large)


def test_super_resolution_trained_on_crops_draws_whole_images(stages):
    sr = stages[1]
    cond = cond_of(stages, 1)[1] | {"low_res": np.zeros((1, 64, 64, 3), np.uint8)}
    drawn = sr.stage.sample(sr.params, np.zeros(1, np.uint32), cond, sr.sampler)
    assert drawn.shape == (1, 128, 128, 3)


def test_outside_the_mask_nothing_changes(stages):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    mask = np.zeros((64, 64, 1), bool)
    mask[:, 32:] = True
    given, seeds = {"image": image, "mask": mask}, np.arange(2, dtype=np.uint32)
    small, large = cascade.draw(stages, seeds, cond_of(stages, 2), given)
    for picture in large:
        np.testing.assert_array_equal(picture[:, :32], image[:, :32])
        assert (picture[:, 32:] != image[:, 32:]).any()
    assert np.array_equal(small[0, :, :16], shrink_pixels(image[None], 32)[0, :, :16])


def test_little_strength_changes_little():
    image = np.full((32, 32, 3), 40, np.uint8)
    image[:16] = 200
    values = shrink_run(load_config("demo"))
    values.diffusion.prediction = "eps"  # untrained, it predicts 0: all of z is the picture
    base, seeds = stages_of(values), np.zeros(1, np.uint32)

    def changed(strength):
        sampler = dataclasses.replace(base[0].sampler, strength=strength, num_steps=8)
        stage = dataclasses.replace(base[0], sampler=sampler)
        [drawn] = cascade.draw([stage], seeds, cond_of(base, 1), {"image": image})
        return np.abs(drawn[0].astype(float) - image).mean()

    assert changed(0.05) < 0.5 * changed(0.9)


def test_a_cascade_in_the_wrong_order_is_one_line(stages):
    with pytest.raises(
        UserError, match="--workdir: 1 enlarges 32 pixels, but before it comes noth"
    ):
        cascade.check_order(stages[1:])
    with pytest.raises(UserError, match="0 is a base model, but before it comes 1, which draws 64"):
        cascade.check_order(stages[::-1], 32)
    cascade.check_order(stages[1:], 32)


def test_super_resolution_trains_draws_grids_and_resumes(tiny_data, tmp_path):

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
