"""Every config key, typed.

`parse` converts the keys of a config file to these dataclasses once, at the start. Sections that
belong to one module are defined there: model, optimizer, sampling, mesh, ema. sections.py has the
others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from imagen_jax import optim
from imagen_jax.common.typed_config import require, typed
from imagen_jax.devices import sharding
from imagen_jax.diffusion import process
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.ema import EmaConfig
from imagen_jax.models.denoiser import NetworkConfig
from imagen_jax.models.networks import NETWORKS
from imagen_jax.sections import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    GuardConfig,
    InitConfig,
    TextConfig,
)

# Fields of the network's config that may differ between a checkpoint and the run that reads it, or
# that follow from the sections `text` and `diffusion`.
NOT_WEIGHTS = (
    *("dtype", "dropout", "scan_blocks"),
    *("text_dim", "text_parts", "pooling", "sequence", "head"),
)

# Fields that are newer than some checkpoints, which were written with their defaults.
NEWER_FIELDS = ("low_res_skip", "text_patch_size")


@dataclasses.dataclass(frozen=True)
class Config:
    """All config keys.

    Attributes:
      seed: seed of the weights, the order of the data and all noise.
      num_steps: steps of the whole run.
      batch_size: examples per step, over all devices.
      data, text, diffusion, optimizer, sampling, mesh, init, checkpoint, ema, guard: the sections.
      model: the network's keys, untyped; see `unet`.
      evals: metric -> keys of sections.EvalConfig, untyped; see `evaluations`.
      microbatches: number of equal microbatches in a batch; their gradients are averaged. 0 chooses
        the fewest that device_batch and a device's memory allow.
      device_batch: examples that a device runs at once in the memory of devices.memory.ROOM; twice
        the memory fits twice as many. Required if microbatches is 0; otherwise it only serves to
        choose mesh.remat.
      log_every: steps between log lines.
      eval_every, sample_every, checkpoint_every: steps between held-out losses, sample grids and
        checkpoints; 0 turns them off (the last step still saves a checkpoint).
      eval_batches: batches per held-out loss.
      num_samples: images per sample grid.
      ema_decay: decay of the EMA of the weights, which evaluation and sampling use; `ema` keeps
        averages of other widths too.
    """

    seed: int
    num_steps: int
    batch_size: int
    data: DataConfig
    model: dict
    microbatches: int = 1
    device_batch: int = 0
    log_every: int = 100
    eval_every: int = 0
    eval_batches: int = 4
    sample_every: int = 0
    num_samples: int = 16
    checkpoint_every: int = 1000
    ema_decay: float = 0.9999
    text: TextConfig = TextConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: optim.OptimizerConfig = optim.OptimizerConfig()
    sampling: SamplerConfig = SamplerConfig()
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ema: EmaConfig = EmaConfig()
    guard: GuardConfig = GuardConfig()
    evals: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for key in ("num_steps", "batch_size", "log_every", "num_samples"):
            ok = 0 < getattr(self, key) < 2**31
            require(ok, key, getattr(self, key), f"1 to {2**31 - 1}")
        least = 0 if self.device_batch > 0 else 1
        require(self.device_batch >= 0, "device_batch", self.device_batch, "0 or more")
        allowed = "1 or more, or 0 with device_batch above 0"
        require(self.microbatches >= least, "microbatches", self.microbatches, allowed)
        for key in ("eval_every", "eval_batches", "sample_every", "checkpoint_every"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 or more, below 1")
        buildable = len(self.text.parts) == 1 or not self.data.build
        allowed = "false with several text encoders, which need data.embeddings"
        require(buildable, "data.build", self.data.build, allowed)

    @property
    def stores(self) -> tuple[str, ...]:
        """The stores of embeddings, one per text encoder; () means those prepared with the data."""
        if not self.data.embeddings:
            return ()
        return tuple(self.data.embeddings.split("+", len(self.text.parts) - 1))

    @functools.cached_property
    def unet(self) -> NetworkConfig:
        """The section `model`, typed, with the fields that follow from `text` and `diffusion`."""
        values = {"name": "unet", **self.model}
        name, text = values.pop("name"), self.text
        known = isinstance(name, str) and name in NETWORKS
        require(known, "model.name", name, ", ".join(NETWORKS))
        parts = [(part.max_tokens, part.dim) for part in text.parts]
        derived = {
            "text_dim": text.width,
            "text_parts": tuple(parts) if len(parts) > 1 else (),
            "pooling": text.pooling,
            "sequence": text.sequence,
            "head": "norm" if self.diffusion.prediction == "eps" else "plain",
        }
        network = NETWORKS[name].config
        fields = {field.name for field in dataclasses.fields(network)}
        derived = {key: value for key, value in derived.items() if key in fields}
        config, prediction = typed(network, values, "model.", **derived), self.diffusion.prediction
        fits = prediction == "x" or not config.low_res_skip
        allowed = f'False unless diffusion.prediction is "x"; it is "{prediction}"'
        require(fits, "model.low_res_skip", config.low_res_skip, allowed)
        return config

    @functools.cached_property
    def evaluations(self) -> dict[str, EvalConfig]:
        """The section `evals`, typed: the metrics that training measures, by name."""
        found = {}
        for name, values in self.evals.items():
            section = isinstance(name, str) and isinstance(values, Mapping)
            require(section, f"evals.{name}", values, "keys such as every, num and guidance")
            found[name] = typed(EvalConfig, values, f"evals.{name}.")
            found[name].check(name)
        return found

    @functools.cached_property
    def full_size(self) -> int:
        """Side, in pixels, of the images that crops are taken from."""
        return self.data.image_size or self.unet.image_size

    @property
    def upscale(self) -> int:
        """Upscaling factor of a super-resolution stage; 1 for a base model."""
        return self.unet.image_size // (self.unet.low_res or self.unet.image_size)

    @property
    def loss_label(self) -> str:
        """Label of a loss axis: what is averaged, and what the network predicts."""
        weighting, prediction = self.diffusion.weighting, self.diffusion.prediction
        # A weighting named after a prediction makes the loss the plain error of that prediction.
        plain = weighting in process.PREDICTIONS
        name = f"{weighting}-MSE" if plain else f"MSE, {weighting} weighting"
        return f"loss ({name}; the network predicts {prediction})"

    def check_crop(self) -> None:
        """Raises UserError unless crops of data.image_size align with low-resolution pixels."""
        size, crop = self.data.image_size, self.unet.image_size
        allowed = f"0, or model.image_size={crop} or more in steps of {self.upscale}"
        fits = size == 0 or (size >= crop and size % self.upscale == 0)
        require(fits, "data.image_size", size, allowed)

    @property
    def identity(self) -> dict[str, Any]:
        """Keys that the weights depend on; a run restores only checkpoints with equal values."""
        parts = {"text": self.text, "diffusion": self.diffusion, "model": self.unet}
        names = {
            "text": ("encoder", "dim", "pooling", "sequence"),
            "diffusion": ("schedule", "prediction"),
            "model": [
                f.name
                for f in dataclasses.fields(self.unet)
                if f.name not in NOT_WEIGHTS
                and (f.name not in NEWER_FIELDS or getattr(self.unet, f.name) != f.default)
            ],
        }
        identity = {f"{s}.{n}": getattr(parts[s], n) for s in parts for n in names[s]} | {
            "model.name": self.model.get("name", "unet"),
            "optimizer.name": self.optimizer.name,
        }
        # The network was trained only on noise levels within the bounds. Defaults are left out, so
        # that checkpoints written before these keys existed match them.
        d = self.diffusion
        if d.log_snr_min != process.LOG_SNR_MIN:
            identity["diffusion.log_snr_min"] = d.log_snr_min
        if d.log_snr_max != process.LOG_SNR_MAX:
            identity["diffusion.log_snr_max"] = d.log_snr_max
        if d.schedule_shift:
            identity["diffusion.schedule_shift"] = d.schedule_shift
        if self.ema.widths:
            identity["ema.widths"] = self.ema.widths
        return identity


def parse(config: Mapping[str, Any]) -> Config:
    """Converts a ConfigDict, or nested dicts as in config.json, to a Config.

    Raises:
      UserError: a key is unknown, missing or out of range.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    parsed = typed(Config, values)
    # These parse model.* and evals.*, so that a bad key fails here, not at the first step.
    parsed.check_crop()
    _ = parsed.evaluations
    return parsed
