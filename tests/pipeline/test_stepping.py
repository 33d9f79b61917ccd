"""Sampling step by step shows what ordinary sampling computes, and ends with the same image."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import FakeEncoder
from PIL import Image

from imagen_jax.diffusion.sampler import THRESHOLDS
from imagen_jax.diffusion.solvers import SOLVERS
from imagen_jax.pipeline import cascade
from imagen_jax.pipeline.prompts import make_requests
from imagen_jax.pipeline.settings import Settings
from imagen_jax.pipeline.stepping import Stepper


@pytest.fixture(scope="module")
def pipe(cascade_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "load_encoder", lambda *args: FakeEncoder())
        yield cascade.load(*cascade_runs)


@pytest.fixture(scope="module")
def stepper(pipe):
    return Stepper(pipe)


def frames(pipe, stepper, **settings):
    parsed = Settings(**settings)
    return list(stepper.frames(pipe.prepare(make_requests("a red circle", parsed), parsed)))


def assert_equal(pipe, stepper, **settings):
    """The last frame of each stage is the image of that stage."""
    found = frames(pipe, stepper, **settings)
    images = pipe("a red circle", return_stages=True, progress=False, **settings)
    for index, [image] in enumerate(images):
        last = [f for f in found if f.stage == index][-1]
        assert last.done == last.total
        np.testing.assert_array_equal(last.image, np.asarray(image))
    return found


def test_both_stages_end_with_the_image_of_ordinary_sampling(pipe, stepper):
    # The settings of tests/web/test_server.py, so that each program is compiled once.
    settings = {"steps": [3, 2], "guidance": [2, 1], "sampler": ["dpmpp_2m", "ddim"]}
    found = assert_equal(pipe, stepper, seed=3, threshold=["dynamic", "static"], **settings)
    assert [(f.stage, f.done, f.total) for f in found] == [
        (0, 0, 3), (0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 0, 2), (1, 1, 2), (1, 2, 2)
    ]  # fmt: skip
    assert found[0].image is None and found[1].image.shape == (32, 32, 3)
    assert not np.array_equal(found[1].image, found[3].image)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_every_solver_ends_with_the_image_of_ordinary_sampling(pipe, stepper, sampler, threshold):
    assert_equal(pipe, stepper, sampler=sampler, threshold=threshold, steps=5, guidance=4)


@pytest.mark.slow
def test_inpainting_ends_with_the_image_of_ordinary_sampling(cascade_runs, pipe):
    base = cascade.Cascade(pipe.stages[:1])
    base._load_encoder = pipe._load_encoder
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))
    mask = np.zeros((32, 32), bool)
    mask[:16] = True
    found = assert_equal(
        base, Stepper(base), image=image, mask=mask, steps=2, resample=2, guidance=1
    )
    assert found[-1].total == 4
    for frame in found[1:]:  # the known pixels are there from the first frame
        np.testing.assert_array_equal(frame.image[16:], np.asarray(image)[16:])


@pytest.mark.slow
def test_a_frame_is_the_x_hat_of_its_evaluation(pipe, stepper):
    """The first of 3 steps of a run ends with the x_hat that the sampler computes there."""
    seen = []
    stage = pipe.stages[0]
    job_frames = frames(pipe, stepper, seed=1, steps=[3, 1], guidance=1)

    def loop(step, carry, times):
        for i in range(len(times[0])):
            carry = step(carry, jax.tree.map(lambda x, i=i: x[i], times))
            seen.append(carry[-1])
        return carry

    parsed = Settings(seed=1, steps=[3, 1], guidance=1)
    job = pipe.prepare(make_requests("a red circle", parsed), parsed)
    cond = pipe.conditioning(stage, job, job.requests)
    sampler = dataclasses.replace(job.samplers[0])
    run = jax.jit(lambda p, s, c: (stage.stage.sample_batch(p, s, c, sampler, loop), seen)[1])
    x_hats = run(stage.params, np.array([1], np.uint32), cond)
    for frame, x_hat in zip(job_frames[1:4], x_hats, strict=True):
        pixels = np.clip((np.asarray(x_hat[0]) + 1) * 127.5, 0, 255)
        np.testing.assert_allclose(frame.image.astype(float), pixels, atol=1.0)
