"""One stage of the cascade: its network, loss and sampler; `load` opens a trained one.

    stage, params = load("runs/demo")
    images = stage.sample(params, seeds, cond)

A stage has no optimizer and no training state; `training.experiment` adds those. Importing this
module does not import TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config import Config
from imagen_jax.devices import sharding
from imagen_jax.diffusion import conditioning, editing, process
from imagen_jax.diffusion.loss import UNIFORM, Between, TimeSampling, diffusion_loss
from imagen_jax.diffusion.sampler import Loop, SamplerConfig, scan
from imagen_jax.models import networks
from imagen_jax.runs import exported
from imagen_jax.runs import workdir as runs
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.posthoc import rebuild_ema

Params = networks.Params
Batch = dict[str, jax.Array]


def batch_size(image_size: int, base: int = 64) -> int:
    """Returns the number of images to sample at once: `base` up to 64x64 pixels, fewer above."""
    return max(1, base * 64**2 // max(64, image_size) ** 2)


class Stage:
    """The network of a config with its loss and sampler, on a device mesh.

    Attributes:
      config: the typed config.
      mesh: the device mesh.
      schedule: the noise schedule.
      abstract_params: shapes, dtypes and shardings of the weights.
      batch_sharding: sharding of every array of a batch.
      batch_ways: number of shards of a batch.
      eval_loss: jitted (params, batch, key, null) -> mean loss over the batch, without dropout,
        given the captions or, if `null` is true, the null prompt.
    """

    def __init__(self, config: Config, mesh: sharding.Mesh | None = None):
        """Builds the stage on `mesh` (default: data parallelism over all devices)."""
        self.config = config
        self.mesh = sharding.make_mesh(sharding.MeshConfig()) if mesh is None else mesh
        d = config.diffusion
        bounds = (d.log_snr_min, d.log_snr_max)
        self.schedule = process.Schedule(d.schedule, *bounds, d.schedule_shift)
        self._network = networks.build(config.unet)
        shapes = jax.eval_shape(self.init_params)
        shardings = sharding.weight_shardings(self.mesh, shapes)
        self.abstract_params: Params = sharding.with_shardings(shapes, shardings)
        self.batch_sharding = sharding.batch_sharding(self.mesh)
        self.batch_ways = sharding.batch_ways(self.mesh)
        self._run_block = self.block_runner("none")
        whole = sharding.replicated(self.mesh)
        self.eval_loss = jax.jit(self._eval_loss, out_shardings=whole)
        self._sample = jax.jit(self.sample_batch, static_argnums=(3,), out_shardings=whole)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of one global training batch."""
        c = self.config
        shapes = {
            "image": ((c.unet.image_size, c.unet.image_size, 3), jnp.uint8),
            "text": ((c.text.tokens, c.text.width), jnp.bfloat16),
            "text_mask": ((c.text.tokens,), jnp.bool_),
        }
        return {
            k: jax.ShapeDtypeStruct((c.batch_size, *shape), dtype, sharding=self.batch_sharding)
            for k, (shape, dtype) in shapes.items()
        }

    @functools.cached_property
    def num_params(self) -> int:
        """Number of parameters of the network."""
        return sum(x.size for x in jax.tree.leaves(self.abstract_params))

    @functools.cached_property
    def model_flops(self) -> float:
        """Model FLOPs of one training step: three forward passes over the batch.

        The backward pass counts as two forward passes. Recomputation does not count.
        """
        network = networks.build(networks.without_scan(self.config.unet))

        def forward(params, batch):
            z, cond = self._inputs(batch, jax.random.key(0))
            return network.apply(params, z, jnp.zeros(z.shape[0]), cond)

        params, batch = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
            for tree in (self.abstract_params, self.abstract_batch)
        )
        one = {k: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for k, x in batch.items()}
        lowered = jax.jit(forward).lower(params, one)
        return 3.0 * self.config.batch_size * (lowered.cost_analysis() or {}).get("flops", 0.0)

    def init_params(self) -> Params:
        """Initializes the weights from the config's seed."""
        return self._network.init(jax.random.key(self.config.seed))

    def block_runner(self, remat: str) -> networks.BlockRunner:
        """Returns what runs each block on this mesh; `remat` is a key of sharding.REMAT."""
        return sharding.block_runner(self.mesh, remat, jnp.dtype(self.config.unet.dtype))

    def put(self, local: dict[str, np.ndarray]) -> Batch:
        """Assembles the global batch on the mesh from each host's rows."""
        return sharding.put_batch(self.mesh, local)

    def loss(
        self,
        params: Params,
        batch: Batch,
        key: jax.Array,
        run_block: networks.BlockRunner | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the training loss, with captions dropped at random (section 2.2, Eq. 1).

        Args:
          batch: image uint8 [B, H, W, 3], text [B, T, D], text_mask bool [B, T].
          key: the source of all randomness.
          run_block: runs each block of the network (see `block_runner`; default: without remat).

        Returns:
          The weighted loss and the log-SNR of each example, float32 [B] each.
        """
        noise_key, drop_key, dropout_key, aug_key = jax.random.split(key, 4)
        x, cond = self._inputs(batch, aug_key)
        drop_b = jax.random.bernoulli(
            drop_key, self.config.diffusion.caption_dropout, (x.shape[0],)
        )
        dropout_key = dropout_key if self.config.unet.dropout else None
        denoise = self._denoiser(params, run_block, dropout_key)
        d = self.config.diffusion
        times = TimeSampling(d.time_sampling, d.time_mean, d.time_std)
        return self._loss(denoise, x, conditioning.drop_text(cond, drop_b), noise_key, times)

    def held_out_losses(
        self, params: Params, batches: Iterable[dict[str, np.ndarray]]
    ) -> dict[str, float]:
        """Computes the mean losses over held-out batches, with the same noise in every call.

        Args:
          batches: this host's rows of each batch.

        Returns:
          eval_loss, with the captions, and eval_loss_null, with the null prompt. Neither drops
          captions at random nor applies dropout.
        """
        losses = []
        for i, batch in enumerate(batches):
            with jax.transfer_guard("allow"):
                args = (params, self.put(batch), jax.random.key(i))
                losses.append([self.eval_loss(*args, null) for null in (False, True)])
        conditional, null = np.mean(jax.device_get(losses), axis=0)
        return {"eval_loss": float(conditional), "eval_loss_null": float(null)}

    @functools.cached_property
    def losses_between(self) -> Callable[..., jax.Array]:
        """Jitted (params, batch, key, low, high) -> the losses of single examples, float32 [B].

        The loss is the mean squared error of eps at log-SNRs drawn uniformly between low and high,
        given the captions. It does not depend on what weights or noise levels training has, so runs
        compare.
        """

        def losses(params, batch, key, low, high):
            noise_key, aug_key = jax.random.split(key)
            x, cond = self._inputs(batch, aug_key)
            return diffusion_loss(
                self._denoiser(params),
                x,
                cond,
                noise_key,
                schedule=self.schedule,
                prediction=self.config.diffusion.prediction,
                time_sampling=Between(low, high),
                low_discrepancy=True,
            )[0]

        return jax.jit(losses, out_shardings=sharding.replicated(self.mesh))

    def sample(
        self,
        params: Params,
        seeds: np.ndarray,
        cond: dict[str, np.ndarray],
        sampler: SamplerConfig | None = None,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Samples one image per seed and prompt, in batches of one compiled size.

        Args:
          params: the weights, usually the EMA.
          seeds: uint32 [N]. A sample depends only on its own seed and cond.
          cond: host arrays: text [N, T, D] and text_mask [N, T]; low_res uint8 [N, h, w, 3] for a
            super-resolution stage; and the keys that `editing.sample_or_edit` reads.
          sampler: the sampler's settings (default: the config section `sampling`).
          batch_size: images per batch, rounded up to a multiple of batch_ways.
          progress: called after each batch with its number of images.

        Returns:
          uint8 [N, H, W, 3].
        """
        sampler = sampler or self.config.sampling
        ways = self.batch_ways
        size = -(-min(batch_size, len(seeds)) // ways) * ways
        images = []
        for start in range(0, len(seeds), size):
            rows = np.minimum(np.arange(start, start + size), len(seeds) - 1)
            part = (seeds[rows], {k: v[rows] for k, v in cond.items()})
            part = jax.device_put(part, self.batch_sharding)
            samples = np.asarray(jax.device_get(self._sample(params, *part, sampler)))
            images.append(samples[: len(seeds) - start])
            if progress:
                progress(len(images[-1]))
        return process.to_uint8(np.concatenate(images))

    def _denoiser(
        self,
        params: Params,
        run_block: networks.BlockRunner | None = None,
        dropout_key: jax.Array | None = None,
    ) -> process.Denoiser:
        run = run_block or self._run_block
        return functools.partial(self._network.apply, params, run=run, dropout_key=dropout_key)

    def _inputs(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, process.Cond]:
        """Returns a batch's images in [-1, 1] and their conditioning, augmented with `key`."""
        x = process.to_float(batch["image"])
        cond = {"text": batch["text"], "text_mask": batch["text_mask"]}
        if self.config.unet.low_res:
            cond |= conditioning.training_condition(x, self.config.unet.low_res, key)
        return x, cond

    def _loss(
        self,
        denoise: process.Denoiser,
        x: jax.Array,
        cond: process.Cond,
        key: jax.Array,
        times: TimeSampling,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the loss and log-SNR of each example, as the section `diffusion` sets."""
        d = self.config.diffusion
        return diffusion_loss(
            denoise,
            x,
            cond,
            key,
            schedule=self.schedule,
            prediction=d.prediction,
            weighting=d.weighting,
            weighting_bias=d.weighting_bias,
            time_sampling=times,
            low_discrepancy=d.low_discrepancy,
        )

    def _eval_loss(
        self, params: Params, batch: Batch, key: jax.Array, null: jax.Array
    ) -> jax.Array:
        noise_key, _, _, aug_key = jax.random.split(key, 4)  # as in `loss`
        x, cond = self._inputs(batch, aug_key)
        # A traced `null` keeps both losses in one program that runs the network once.
        cond = conditioning.drop_text(cond, jnp.full(x.shape[0], null))
        # Uniform in t whatever training draws, so that runs compare.
        return self._loss(self._denoiser(params), x, cond, noise_key, UNIFORM)[0].mean()

    def sample_batch(
        self,
        params: Params,
        seeds_b: jax.Array,
        cond: process.Cond,
        sampler: SamplerConfig,
        loop: Loop = scan,
    ) -> jax.Array:
        """Computes the samples of one batch, float32 [B, H, W, 3]; traced by `sample`."""
        size, prediction = self.config.unet.image_size, self.config.diffusion.prediction
        height = width = size
        if self.config.unet.low_res:
            height, width = (self.config.upscale * n for n in cond["low_res"].shape[1:3])
            low_res = cond["low_res"]
            cond = cond | conditioning.sampling_condition(low_res, sampler.aug_level, seeds_b)
        return editing.sample_or_edit(
            self._denoiser(params),
            self.schedule,
            prediction,
            sampler,
            seeds_b,
            (height, width, 3),
            cond,
            loop,
        )


def load(
    workdir: str | Path, step: int | None = None, ema: float | None = None, raw: bool = False
) -> tuple[Stage, Params]:
    """Loads a stage and its EMA weights from a workdir or an exported model onto all devices.

    The mesh may differ from that of training, and training may still be running.

    Args:
      step: checkpoint step to load, or step of a snapshot if `ema` is set (default: the newest).
      ema: width of the average to rebuild from the run's snapshots, see imagen_jax.ema (default:
        the EMA with ema_decay).
      raw: load the weights themselves instead of their EMA.

    Raises:
      UserError: the workdir has no run, or no such checkpoint; see also `runs.posthoc.rebuild_ema`.
      RunError: the checkpoint or the exported weights are damaged.
    """
    config = dataclasses.replace(runs.read_config(workdir), mesh=sharding.MeshConfig())
    if ema is not None:
        stage = Stage(config)
        return stage, rebuild_ema(workdir, config, stage.abstract_params, ema, step)
    if exported.is_exported(workdir):
        exported.check_has(workdir, step, raw)
        stage = Stage(config)
        return stage, exported.restore(workdir, stage.abstract_params)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        step = checkpoints.existing_step(step)  # before the network is built
        stage = Stage(config)
        return stage, checkpoints.restore_ema(stage.abstract_params, config.identity, step, raw)
