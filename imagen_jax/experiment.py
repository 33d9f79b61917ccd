"""A config becomes an Experiment: the network, the state's shapes and shardings, the jitted steps.

Training, sampling, planning and the tests all build through here, so what is planned is what runs.
Nothing here imports TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import cascade, diffusion, editing, fits, optim, sharding, topologies
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.compilation import OPTIONS
from imagen_jax.errors import UserError
from imagen_jax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from imagen_jax.models.functional import Functional, functional
from imagen_jax.models.unet import UNet, UNetConfig
from imagen_jax.run_config import Config, parse
from imagen_jax.sampling import SamplerConfig
from imagen_jax.train_step import TrainState, init_state, train_step

NETWORKS = {UNetConfig: UNet, EfficientUNetConfig: EfficientUNet}


def _network(config: UNetConfig | EfficientUNetConfig) -> Functional:
    return functional(lambda rngs: NETWORKS[type(config)](config, rngs=rngs))


class Experiment:
    """Everything a program needs to train or to sample one stage.

    Attributes:
      config: the typed config.
      mesh: the device mesh.
      remat: what of a block is computed anew in the backward pass, a key of sharding.REMAT.
      microbatches: parts in which a batch is taken.
      compiler_options: of the step, for the devices' platform.
      abstract_state: TrainState of ShapeDtypeStructs that carry shardings.
      init: () -> TrainState on the devices; the state never lies on one of them whole.
      step: jitted (state, batch) -> (state, metrics); donates the state.
      eval_loss: jitted (params, batch, key) -> mean loss.
    """

    def __init__(self, config: Config, devices: list[jax.Device] | None = None):
        self.config = config
        devices = jax.devices() if devices is None else devices
        name, slices = config.mesh.topology, config.mesh.slice
        topology = topologies.lookup(name, slices) if name else None
        if topology and len(devices) != topology.num_chips:
            several = f" and config.mesh.slice {slices}" if slices > 1 else ""
            raise UserError(
                f"config.mesh.topology is {name!r}{several}, {topology.num_chips} chips; here are "
                f"{len(devices)} device(s)"
            )
        kind = devices[0].device_kind
        if topology and devices[0].platform == "tpu" and kind not in topology.chip.kinds:
            raise UserError(
                f"config.mesh.topology is {name!r}, of {topology.chip.kinds[0]}; here are {kind}"
            )
        sizes = (config.batch_size, config.microbatches)
        self.mesh = sharding.make_mesh(fits.fill_tiles(config.mesh, *sizes, devices), devices)
        self.schedule = diffusion.Schedule(config.diffusion.schedule)
        self.optimizer = optim.make_optimizer(config.optimizer, config.num_steps)
        self._network = _network(config.unet)

        shapes = jax.eval_shape(self._init)
        shardings = sharding.weight_shardings(self.mesh, shapes)
        self.abstract_state: TrainState = sharding.with_shardings(shapes, shardings)
        self.batch_ways = sharding.batch_ways(self.mesh)
        memory = (topology and topology.chip.hbm_bytes) or topologies.device_memory()
        self.remat, self.microbatches = fits.choose(config, self.mesh, self.abstract_state, memory)
        sharding.check_batch(self.mesh, config.batch_size, self.microbatches)
        self._run_block = sharding.block_runner(self.mesh, self.remat, jnp.dtype(config.unet.dtype))
        self.batch_sharding = sharding.batch_sharding(self.mesh)
        whole = sharding.replicated(self.mesh)
        # Run once: on a CPU, optimizing a thousand small random number generators takes longer.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.init: Callable[[], TrainState] = jax.jit(
            self._init, out_shardings=shardings, compiler_options=quick
        )
        self.compiler_options = OPTIONS.get(devices[0].platform, {})
        self.step = jax.jit(
            functools.partial(
                train_step,
                loss_fn=self._loss,
                optimizer=self.optimizer,
                ema_decay=config.ema_decay,
                seed=config.seed,
                microbatches=self.microbatches,
            ),
            in_shardings=(shardings, self.batch_sharding),
            out_shardings=(shardings, whole),
            donate_argnums=(0,),
            compiler_options=self.compiler_options,
        )
        self.eval_loss = jax.jit(self._eval_loss, out_shardings=whole)
        self._draw = jax.jit(self._sample, static_argnums=(3,), out_shardings=whole)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of one global batch."""
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
    def batch_share(self) -> tuple[int, int]:
        """Which share of a batch this host reads, and how many there are; see sharding."""
        return sharding.batch_share(self.mesh)

    @functools.cached_property
    def num_params(self) -> int:
        """Parameters of the network."""
        return sum(x.size for x in jax.tree.leaves(self.abstract_state.params))

    @functools.cached_property
    def state_bytes_per_device(self) -> int:
        """Bytes of weights, EMA and optimizer state that each device holds."""
        return sharding.bytes_per_device(self.abstract_state)

    @functools.cached_property
    def model_flops(self) -> float:
        """FLOPs of one training step by the model's own count: three forward passes of the batch.

        The backward pass costs twice the forward; recomputation is not counted.
        """
        c, unet = self.config, self.config.unet
        if isinstance(unet, EfficientUNetConfig):
            unet = dataclasses.replace(unet, scan_blocks=False)  # XLA counts a loop's body once
        network = _network(unet)

        def forward(params, batch):
            z, cond = self._inputs(batch, jax.random.key(0))
            return network.apply(params, z, jnp.zeros(z.shape[0]), cond)

        batch = {
            k: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
            for k, x in self.abstract_batch.items()
        }
        lowered = jax.jit(forward).lower(self.abstract_params, batch)
        return 3.0 * c.batch_size * (lowered.cost_analysis() or {}).get("flops", 0.0)

    @property
    def abstract_params(self) -> Any:
        """Shapes of the weights without shardings, for analysis off the mesh."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.abstract_state.params
        )

    def put(self, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows of a batch -> the global batch on the mesh."""
        return sharding.put_batch(self.mesh, local)

    def put_replicated(self, tree: Any) -> Any:
        """The same host arrays on every device."""
        return jax.device_put(tree, sharding.replicated(self.mesh))

    def draw(
        self,
        params: Any,
        seeds: np.ndarray,
        cond: dict[str, np.ndarray],
        sampler: SamplerConfig | None = None,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Draws one image per seed and prompt, in batches of one compiled size.

        Args:
          params: the weights, usually `state.ema`.
          seeds: uint32 [N]; a sample depends on its own seed and prompt only.
          cond: text [N, T, D] and text_mask [N, T] on the host.
          sampler: instead of the config's section `sampling`.
          progress: told the number of images after each batch.

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
            drawn = np.asarray(jax.device_get(self._draw(params, *part, sampler)))
            images.append(drawn[: len(seeds) - start])
            if progress:
                progress(len(images[-1]))
        return diffusion.to_uint8(np.concatenate(images))

    def held_out_loss(self, params: Any, batches: Iterable[dict[str, np.ndarray]]) -> float:
        """The mean loss over batches of this host's rows, with the same noise every time."""
        losses = []
        for i, batch in enumerate(batches):
            with jax.transfer_guard("allow"):
                losses.append(self.eval_loss(params, self.put(batch), jax.random.key(i)))
        return float(np.mean(jax.device_get(losses)))

    def _init(self) -> TrainState:
        params = self._network.init(jax.random.key(self.config.seed))
        return init_state(params, self.optimizer)

    def _denoiser(self, params: Any, dropout_key: jax.Array | None = None):
        return functools.partial(
            self._network.apply, params, run=self._run_block, dropout_key=dropout_key
        )

    def _inputs(self, batch: dict[str, jax.Array], key: jax.Array):
        """A batch's images in [-1, 1] and what they are conditioned on; key is for its noise."""
        x = diffusion.to_float(batch["image"])
        cond = {"text": batch["text"], "text_mask": batch["text_mask"]}
        if self.config.unet.low_res:
            cond |= cascade.training_condition(x, self.config.unet.low_res, key)
        return x, cond

    def _loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array):
        d = self.config.diffusion
        noise_key, drop_key, dropout_key, aug_key = jax.random.split(key, 4)
        x, cond = self._inputs(batch, aug_key)
        drop_b = jax.random.bernoulli(drop_key, d.caption_dropout, (x.shape[0],))
        return diffusion.diffusion_loss(
            self._denoiser(params, dropout_key if self.config.unet.dropout else None),
            x,
            diffusion.drop_text(cond, drop_b),
            noise_key,
            schedule=self.schedule,
            prediction=d.prediction,
            weighting=d.weighting,
            low_discrepancy=d.low_discrepancy,
        )

    def _eval_loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        return self._loss(params, batch, key)[0].mean()

    def _sample(self, params: Any, seeds_b: jax.Array, cond: dict, sampler: SamplerConfig):
        size, prediction = self.config.unet.image_size, self.config.diffusion.prediction
        height = width = size
        if self.config.unet.low_res:
            height, width = (self.config.upscale * n for n in cond["low_res"].shape[1:3])
            cond = cond | cascade.sampling_condition(cond["low_res"], sampler.aug_level, seeds_b)
        shape, denoise = (height, width, 3), self._denoiser(params)
        return editing.draw(denoise, self.schedule, prediction, sampler, seeds_b, shape, cond)


def build(
    config: Mapping[str, Any] | Config, devices: list[jax.Device] | None = None
) -> Experiment:
    """Builds the experiment that a config describes, on `devices` (default: all)."""
    return Experiment(config if isinstance(config, Config) else parse(config), devices)


def _saved_config(workdir: Path) -> Config:
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no run: {path.name} is missing")
    return parse(json.loads(path.read_text()))


def newest_step(workdir: Path) -> int:
    """The step of the newest checkpoint of a workdir.

    Raises:
      UserError: no run there, or it has no checkpoint.
    """
    _saved_config(workdir)  # opening the checkpoints would make their folder
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.existing_step()


def load(workdir: Path, step: int | None = None) -> tuple[Experiment, Any]:
    """The experiment of a finished or running workdir, and its EMA weights, on these devices.

    Raises:
      UserError: no run there, or no such checkpoint.
    """
    config = _saved_config(workdir)
    # The mesh it was trained on need not be the one it is sampled on.
    here = {"mesh": sharding.MeshConfig(), "batch_size": jax.device_count(), "microbatches": 1}
    experiment = Experiment(dataclasses.replace(config, **here))
    checkpoints = Checkpoints(workdir)
    ema = checkpoints.restore_ema(experiment.abstract_state.ema, config.identity, step)
    checkpoints.close()
    return experiment, ema
