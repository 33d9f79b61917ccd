"""Solver steps and thresholding against diffusers' schedulers, at diffusers' noise levels."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import jax.numpy as jnp  # noqa: E402

from imagen_jax.diffusion import process, sampler, solvers  # noqa: E402
from imagen_jax.diffusion.process import PREDICTIONS, Schedule  # noqa: E402

SHAPE = (2, 3, 8, 8)
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
BETAS = {"linear": LINEAR, "squaredcos_cap_v2": {"num_train_timesteps": 1000}}
OUTPUT_NAMES = {"eps": "epsilon", "x": "sample", "v": "v_prediction"}
STEP = 20
TIMES = [999, 779, 499, 39]


def make(scheduler_class, betas, prediction, **options):
    scheduler = scheduler_class(
        beta_schedule=betas,
        prediction_type=OUTPUT_NAMES[prediction],
        clip_sample=False,
        timestep_spacing="trailing",
        **BETAS[betas],
        **options,
    )
    scheduler.set_timesteps(1000 // STEP)
    return scheduler


def log_snr_of(scheduler, timestep):
    """Log-SNR of a timestep; diffusers' timestep k is the noise level after k + 1 DDPM steps."""
    alpha_bar = scheduler.alphas_cumprod[timestep].double().item()
    return jnp.float32(np.log(alpha_bar) - np.log1p(-alpha_bar))


def inputs(seed):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(SHAPE, np.float32)) for _ in range(2)]


def x_hat_of(prediction, output, z, log_snr):
    output, z = jnp.asarray(output.numpy()), jnp.asarray(z.numpy())
    return PREDICTIONS[prediction].to_x_eps(output, z, log_snr)[0]


def assert_close(ours, theirs):
    """Tolerance 1e-5 of the largest value: with eps at t = 999, x_hat is in the hundreds."""
    theirs = theirs.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("timestep", TIMES)
@pytest.mark.parametrize("prediction", OUTPUT_NAMES)
@pytest.mark.parametrize("betas", BETAS)
def test_ddim_step(betas, prediction, timestep):
    scheduler = make(diffusers.DDIMScheduler, betas, prediction)
    z, output = inputs(timestep)
    theirs = scheduler.step(output, timestep, z)
    log_snr_t, log_snr_s = (log_snr_of(scheduler, k) for k in (timestep, timestep - STEP))
    x_hat = x_hat_of(prediction, output, z, log_snr_t)
    ours = solvers.ddim(jnp.asarray(z.numpy()), x_hat, log_snr_t, log_snr_s)
    assert_close(x_hat, theirs.pred_original_sample)
    assert_close(ours, theirs.prev_sample)


@pytest.mark.parametrize("timestep", TIMES)
@pytest.mark.parametrize("prediction", OUTPUT_NAMES)
@pytest.mark.parametrize("gamma, variance_type", [(0.0, "fixed_small"), (1.0, "fixed_large")])
@pytest.mark.parametrize("betas", BETAS)
def test_ddpm_step(betas, gamma, variance_type, prediction, timestep):
    scheduler = make(diffusers.DDPMScheduler, betas, prediction, variance_type=variance_type)
    z, output = inputs(timestep)
    theirs = scheduler.step(output, timestep, z, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    log_snr_t, log_snr_s = (log_snr_of(scheduler, k) for k in (timestep, timestep - STEP))
    x_hat = x_hat_of(prediction, output, z, log_snr_t)

    def noise_between(*variances):
        return jnp.sqrt(variances[int(gamma)]) * jnp.asarray(noise.numpy())

    _, ours = solvers.ancestral_step(
        (), jnp.asarray(z.numpy()), x_hat, log_snr_t, log_snr_s, noise_between
    )
    assert_close(ours, theirs.prev_sample)


def model(z):
    """A network for both libraries; its input is our z."""
    return (0.9 * z).tanh() + 0.1 if isinstance(z, torch.Tensor) else jnp.tanh(0.9 * z) + 0.1


@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("prediction", OUTPUT_NAMES)
@pytest.mark.parametrize("betas", BETAS)
def test_dpmpp_2m_trajectory(betas, prediction, num_steps):
    """Every step starts from diffusers' z and our state; diffusers' levels end at its sigma_min."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=betas,
        prediction_type=OUTPUT_NAMES[prediction],
        final_sigmas_type="sigma_min",
        lower_order_final=False,
        **BETAS[betas],
    )
    scheduler.set_timesteps(num_steps)
    log_snr = jnp.float32(-2 * np.log(scheduler.sigmas.numpy()))
    z, _ = inputs(num_steps)
    state = solvers.dpmpp_2m_init(jnp.asarray(z.numpy()), log_snr[0])
    for k, timestep in enumerate(scheduler.timesteps):
        output = model(z)
        x_hat = x_hat_of(prediction, output, z, log_snr[k])
        z_t = jnp.asarray(z.numpy())
        state, ours = solvers.dpmpp_2m_step(state, z_t, x_hat, log_snr[k], log_snr[k + 1], None)
        z = scheduler.step(output, timestep, z).prev_sample
        assert_close(ours, z)


@pytest.mark.parametrize("prediction", OUTPUT_NAMES)
def test_dpmpp_2m_sample(prediction):
    """A whole sample; diffusers ends at sigma = 0, which gives the last x_hat."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", prediction_type=OUTPUT_NAMES[prediction], **LINEAR
    )
    scheduler.set_timesteps(20)
    log_snr = jnp.float32(-2 * np.log(scheduler.sigmas.numpy()[:-1]))
    z, _ = inputs(0)
    ours = jnp.asarray(z.numpy())
    state = solvers.dpmpp_2m_init(ours, log_snr[0])
    for timestep in scheduler.timesteps:
        z = scheduler.step(model(z), timestep, z).prev_sample
    for k in range(20):
        x_hat, _ = PREDICTIONS[prediction].to_x_eps(model(ours), ours, log_snr[k])
        times = log_snr[k], log_snr[min(k + 1, 19)]
        state, ours = solvers.dpmpp_2m_step(state, ours, x_hat, *times, None)
    assert_close(x_hat, z)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("betas", BETAS)
def test_heun_trajectory(betas, prediction):
    """diffusers integrates y = z / alpha over sigma / alpha, down to 0, where y is x_hat.

    It starts at timestep 949. At 999 the cosine schedule's sigma / alpha is 20,000, and a corrected
    step is mostly rounding error; `solvers.evaluations` does not correct the first step either.
    """
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule=betas,
        prediction_type=OUTPUT_NAMES[prediction],
        **BETAS[betas],
    )
    scheduler.set_timesteps(timesteps=list(range(949, 0, -100)))
    sigmas = scheduler.sigmas.numpy()
    log_snr = jnp.float32(-2 * np.log(sigmas[:-1]))
    y = inputs(0)[0] * float(np.sqrt(1 + sigmas[0] ** 2))
    z_t = jnp.asarray(scheduler.scale_model_input(y, scheduler.timesteps[0]).numpy())
    state = solvers.heun_init(z_t, log_snr[0])
    for k, timestep in enumerate(scheduler.timesteps):
        z = scheduler.scale_model_input(y, timestep)
        output = model(z)
        y = scheduler.step(output, timestep, y).prev_sample
        x_hat = x_hat_of(prediction, output, z, log_snr[k])
        if k + 1 == len(scheduler.timesteps):
            assert_close(x_hat, y)
            return
        z_t = jnp.asarray(z.numpy())
        state, ours = solvers.heun_step(state, z_t, x_hat, log_snr[k], log_snr[k + 1], None)
        assert_close(ours, y / float(np.sqrt(1 + sigmas[k + 1] ** 2)))


def test_linear_schedule_is_diffusers_linear():
    alpha_bar = make(diffusers.DDPMScheduler, "linear", "eps").alphas_cumprod.numpy()
    alpha, _ = process.alpha_sigma(Schedule("linear").log_snr(jnp.arange(1, 1001) / 1000))
    np.testing.assert_allclose(np.square(alpha), alpha_bar, rtol=1e-4)


def test_cosine_schedule_is_diffusers_cosine_except_for_its_offset():
    """diffusers uses cos(pi/2 (t + s) / (1 + s)) with s = 0.008, scaled to 1 at t = 0; here s = 0.

    diffusers caps beta of the last step at 0.999, so that step is left out.
    """
    s = 0.008
    alpha_bar = make(diffusers.DDPMScheduler, "squaredcos_cap_v2", "eps").alphas_cumprod.numpy()
    t = np.arange(1, 1000) / 1000

    def alpha_at(t):
        log_snr = Schedule("cosine").log_snr(jnp.asarray(t, jnp.float32))
        return np.asarray(process.alpha_sigma(log_snr)[0])

    shifted = alpha_at((t + s) / (1 + s)) / alpha_at(s / (1 + s))
    np.testing.assert_allclose(shifted, np.sqrt(alpha_bar[:-1]), atol=1e-4)
    np.testing.assert_allclose(alpha_at(t), np.sqrt(alpha_bar[:-1]), atol=0.013)


def test_forward_process():
    scheduler = make(diffusers.DDPMScheduler, "linear", "eps")
    x, eps = inputs(0)
    timesteps = torch.tensor([3, 700])
    theirs = scheduler.add_noise(x, eps, timesteps)
    log_snr_b = jnp.stack([log_snr_of(scheduler, k) for k in timesteps.tolist()])
    x, eps = jnp.asarray(x.numpy()), jnp.asarray(eps.numpy())
    assert_close(process.q_sample(x, eps, log_snr_b), theirs)
    velocity = scheduler.get_velocity(*inputs(0), timesteps)
    assert_close(PREDICTIONS["v"].target(x, eps, log_snr_b), velocity)


def test_dynamic_threshold():
    """diffusers also caps the percentile at sample_max_value, here set too high to matter."""
    scheduler = make(
        diffusers.DDIMScheduler, "linear", "eps", thresholding=True, sample_max_value=1e6
    )
    scale = torch.tensor([0.3, 5.0]).reshape(2, 1, 1, 1)
    x_hat = inputs(0)[0] * scale
    theirs = scheduler._threshold_sample(x_hat)
    assert_close(sampler.dynamic_threshold(jnp.asarray(x_hat.numpy()), 99.5), theirs)


def test_ddim_step_after_dynamic_threshold():
    """Both recompute eps_hat from z_t and the thresholded x_hat."""
    scheduler = make(
        diffusers.DDIMScheduler, "linear", "eps", thresholding=True, sample_max_value=1e6
    )
    z, output = inputs(1)
    theirs = scheduler.step(output, 499, z, use_clipped_model_output=True).prev_sample
    log_snr_t, log_snr_s = log_snr_of(scheduler, 499), log_snr_of(scheduler, 499 - STEP)
    x_hat = sampler.dynamic_threshold(x_hat_of("eps", output, z, log_snr_t), 99.5)
    ours = solvers.ddim(jnp.asarray(z.numpy()), x_hat, log_snr_t, log_snr_s)
    assert_close(ours, theirs)
