"""Builds the Experiment of a config: a stage, its training state, and the jitted training step.

Training, planning and the tests all build through this module, so the planned program is the one
that runs. Importing this module does not import TensorFlow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from imagen_jax import optim
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config, parse
from imagen_jax.devices import memory, sharding, topologies
from imagen_jax.devices.compilation import OPTIONS
from imagen_jax.stage import Batch, Stage
from imagen_jax.training.step import TrainState, init_state, train_step


class Experiment:
    """Everything needed to train one stage.

    Attributes:
      config: the typed config.
      stage: network, loss and sampling.
      mesh: the device mesh.
      remat: the rematerialization policy of a block, a key of sharding.REMAT.
      microbatches: number of microbatches in a batch.
      compiler_options: XLA's options for the step on the devices' platform.
      abstract_state: TrainState of ShapeDtypeStructs with shardings.
      init: () -> TrainState, sharded from the start, so that no device ever holds all of it.
      start_from: params -> TrainState at step 0 with these weights.
      step: jitted (state, batch) -> (state, metrics); donates the state.
    """

    def __init__(self, config: Config, devices: list[jax.Device] | None = None):
        self.config = config
        devices = jax.devices() if devices is None else devices
        topology = _checked_topology(config, devices)
        sizes = (config.batch_size, config.microbatches)
        self.mesh = sharding.make_mesh(memory.fill_tiles(config.mesh, *sizes, devices), devices)
        self.stage = Stage(config, self.mesh)
        self.optimizer = optim.make_optimizer(config.optimizer, config.num_steps)

        # From the stage's shapes: tracing the initialization of a large network takes seconds.
        widths = config.ema.widths
        new_state = functools.partial(
            init_state, optimizer=self.optimizer, num_averages=len(widths)
        )
        shapes = jax.eval_shape(new_state, self.stage.abstract_params)
        shardings = sharding.weight_shardings(self.mesh, shapes)
        self.abstract_state: TrainState = sharding.with_shardings(shapes, shardings)
        available = (topology and topology.chip.hbm_bytes) or memory.device_memory()
        self.remat, self.microbatches = memory.choose(
            self.mesh,
            self.abstract_state,
            self.abstract_state.params,
            available,
            batch_size=config.batch_size,
            microbatches=config.microbatches,
            device_batch=config.device_batch,
            remat=config.mesh.remat,
            scanned=getattr(config.unet, "scan_blocks", False),
        )
        sharding.check_batch(self.mesh, config.batch_size, self.microbatches)
        # Initialization runs once. On a CPU, XLA would take longer to optimize its thousand small
        # random number generators than to run them.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.init: Callable[[], TrainState] = jax.jit(
            lambda: new_state(self.stage.init_params()),
            out_shardings=shardings,
            compiler_options=quick,
        )
        self.start_from: Callable[[Any], TrainState] = jax.jit(new_state, out_shardings=shardings)
        self.compiler_options = OPTIONS.get(devices[0].platform, {})
        self.step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]] = jax.jit(
            functools.partial(
                train_step,
                loss_fn=functools.partial(
                    self.stage.loss, run_block=self.stage.block_runner(self.remat)
                ),
                optimizer=self.optimizer,
                ema_decay=config.ema_decay,
                seed=config.seed,
                microbatches=self.microbatches,
                widths=widths,
            ),
            in_shardings=(shardings, self.stage.batch_sharding),
            out_shardings=(shardings, sharding.replicated(self.mesh)),
            donate_argnums=(0,),
            compiler_options=self.compiler_options,
        )

    @functools.cached_property
    def replicated(self) -> jax.sharding.Sharding:
        """Sharding of a whole array on every device."""
        return sharding.replicated(self.mesh)

    @functools.cached_property
    def batch_share(self) -> tuple[int, int]:
        """This host's share of a batch, (index, number of shares); see sharding.batch_share."""
        return sharding.batch_share(self.mesh)

    def check_fits(self, available: float) -> None:
        """Raises UserError, with the figures, if the run cannot fit on its devices.

        Counts what every run needs at least: weights, averages, optimizer state, gradients, and the
        input and output of one block at the first level.

        Args:
          available: memory per device, bytes.
        """
        side, channels = self.config.unet.first_level
        pixels = self.config.batch_size * side**2 / (self.stage.batch_ways * self.microbatches)
        block = pixels * channels * jnp.dtype(self.config.unet.dtype).itemsize
        memory.check_fits(
            self.abstract_state,
            self.abstract_state.params,
            activations=2 * block,
            batch_size=self.config.batch_size,
            available=available,
        )


def _checked_topology(config: Config, devices: list[jax.Device]) -> topologies.Topology | None:
    """Returns the topology that the config names, if any.

    Raises:
      UserError: the topology and the devices differ in number or kind.
    """
    name, slices = config.mesh.topology, config.mesh.slice
    if not name:
        return None
    topology = topologies.lookup(name, slices)
    if len(devices) != topology.num_chips:
        several = f" and config.mesh.slice {slices}" if slices > 1 else ""
        raise UserError(
            f"config.mesh.topology is {name!r}{several}, {topology.num_chips} chips; here are "
            f"{len(devices)} device(s)"
        )
    kind = devices[0].device_kind
    if devices[0].platform == "tpu" and kind not in topology.chip.kinds:
        raise UserError(
            f"config.mesh.topology is {name!r}, of {topology.chip.kinds[0]}; here are {kind}"
        )
    return topology


def build(
    config: Mapping[str, Any] | Config, devices: list[jax.Device] | None = None
) -> Experiment:
    """Builds the experiment of a config on `devices` (default: all)."""
    return Experiment(config if isinstance(config, Config) else parse(config), devices)
