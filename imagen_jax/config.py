"""Every config key, typed: the sections that belong to no module of their own, and the whole.

A config file holds loose keys; `parse` turns them into these dataclasses once, at the start.
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
from imagen_jax.diffusion.conditioning import TextPart
from imagen_jax.diffusion.loss import WEIGHTINGS
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.models.denoiser import POOLING, SEQUENCE, NetworkConfig
from imagen_jax.models.networks import NETWORKS

# Of the U-Net's config: what may differ between a checkpoint and the run that reads it, and what
# stands in the section `text`.
NOT_WEIGHTS = ("dtype", "dropout", "scan_blocks", "text_dim", "text_parts", "pooling", "sequence")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Config section `text`: the frozen encoder, and how the U-Net reads it (section 4.1).

    Attributes:
      encoder: the name recorded in the data's embeddings, e.g. "byte-tiny", "t5-v1_1-xxl"; or
        several joined by "+", whose tokens stand one after another. Then dim and max_tokens are
        tuples.
      dim: width of its embeddings; 4096 for T5-XXL.
      max_tokens: embeddings are padded or refused at this length; 128 for T5.
      pooling: the vector added to the time embedding: "attention", "mean" or "none".
      sequence: "cross_attention_layernorm", "cross_attention" or "none".
    """

    encoder: str = "byte-tiny"
    dim: int | tuple[int, ...] = 128
    max_tokens: int | tuple[int, ...] = 192
    pooling: str = "attention"
    sequence: str = "cross_attention_layernorm"

    def __post_init__(self):
        require(self.pooling in POOLING, "text.pooling", self.pooling, ", ".join(POOLING))
        require(self.sequence in SEQUENCE, "text.sequence", self.sequence, ", ".join(SEQUENCE))
        names = self.encoder.split("+")
        require(all(names), "text.encoder", self.encoder, "a name, or several joined by +")
        for key in ("dim", "max_tokens"):
            value = getattr(self, key)
            one = isinstance(value, int)
            fits = len(names) == 1 if one else len(names) == len(value) > 1
            allowed = f"{len(names)} number(s), one for each encoder in text.encoder"
            require(fits, f"text.{key}", value, allowed)
            require(min((value,) if one else value) > 0, f"text.{key}", value, "1 or more")

    @property
    def parts(self) -> tuple[TextPart, ...]:
        """The encoders in the order of their tokens."""
        names = self.encoder.split("+")
        if len(names) == 1:
            return (TextPart(self.encoder, self.dim, self.max_tokens),)
        return tuple(map(TextPart, names, self.dim, self.max_tokens))

    @property
    def width(self) -> int:
        """D of the text: the largest dim."""
        return max(part.dim for part in self.parts)

    @property
    def tokens(self) -> int:
        """T of the text: the most tokens of all encoders together."""
        return sum(part.max_tokens for part in self.parts)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Config section `diffusion`: the forward process and what the network predicts.

    Attributes:
      schedule: a key of process.SCHEDULES.
      log_snr_min, log_snr_max: bounds of the schedule's log-SNR, at t = 1 and t = 0.
      prediction: a key of process.PREDICTIONS.
      weighting: a key of loss.WEIGHTINGS.
      caption_dropout: probability of training on the null prompt, which guidance needs; 0.1 in the
        paper.
      low_discrepancy: spread the times of a batch evenly over [0, 1]; each stays uniform.
    """

    schedule: str = "cosine"
    log_snr_min: float = process.LOG_SNR_MIN
    log_snr_max: float = process.LOG_SNR_MAX
    prediction: str = "eps"
    weighting: str = "eps"
    caption_dropout: float = 0.1
    low_discrepancy: bool = False

    def __post_init__(self):
        process.Schedule(self.schedule, self.log_snr_min, self.log_snr_max)
        for key, table in (("prediction", process.PREDICTIONS), ("weighting", WEIGHTINGS)):
            process.lookup(table, f"diffusion.{key}", getattr(self, key))
        p = self.caption_dropout
        require(0 <= p <= 1, "diffusion.caption_dropout", p, "0 to 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Config section `data`; what data_pipelines.reading reads.

    Attributes:
      task: a SeqIO task, see `data_pipelines.reading.tasks`.
      dir: where the prepared datasets lie.
      embeddings: a store to take the captions' embeddings from; "" for those in the records. With
        several text encoders, a store of each, joined by "+".
      categories: train on, evaluate and draw only captions of these, such as ("Colors",); () is
        all. What `build` draws is of these alone.
      eval_split: held out, for the evaluation loss.
      sample_split: its first captions are drawn during training.
      build: draw the embedded dataset if it is not there yet (scenes tasks only).
      num_train: how many scenes to draw then.
      image_size: side to which images are brought, of which training sees random crops of
        model.image_size pixels; 0 is model.image_size, no crop (section 2.5: 1024 and 256).
      in_memory: decode all images for training once, at the start, and keep them: worth it where
        they are few, or the CPU has other work. Every host keeps all of them.
    """

    task: str
    dir: str = "data"
    embeddings: str = ""
    categories: tuple[str, ...] = ()
    eval_split: str = "validation"
    sample_split: str = "validation"
    build: bool = False
    num_train: int = 20_000
    image_size: int = 0
    in_memory: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Config section `checkpoint`.

    Attributes:
      max_to_keep: the newest this many are kept.
      keep_every: besides, every checkpoint at a multiple of this many steps is kept; 0 for none.
    """

    max_to_keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        require(self.max_to_keep > 0, "checkpoint.max_to_keep", self.max_to_keep, "1 or more")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    """All config keys. Intervals are in steps; 0 turns the action off.

    Attributes:
      microbatches: parts of a batch whose gradients are averaged; 0 is as few as device_batch and
        the room on a device allow.
      device_batch: examples that a device takes at once in fits.ROOM; read where microbatches
        is 0. With twice the room it takes twice as many.
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
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        for key in ("num_steps", "batch_size", "log_every", "num_samples"):
            require(getattr(self, key) > 0, key, getattr(self, key), "1 or more")
        least = 0 if self.device_batch > 0 else 1
        allowed = "1 or more, or 0 with device_batch above 0"
        require(self.microbatches >= least, "microbatches", self.microbatches, allowed)
        for key in ("eval_every", "eval_batches", "sample_every", "checkpoint_every"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 up to, not including, 1")
        buildable = len(self.text.parts) == 1 or not self.data.build
        allowed = "false with several text encoders, whose embeddings are in stores"
        require(buildable, "data.build", self.data.build, allowed)

    @property
    def stores(self) -> tuple[str, ...]:
        """The stores of embeddings, one for each text encoder; none for those in the records."""
        if not self.data.embeddings:
            return ()
        return tuple(self.data.embeddings.split("+", len(self.text.parts) - 1))

    @functools.cached_property
    def unet(self) -> NetworkConfig:
        """The section `model`, together with what it must know of the text."""
        values = {"name": "unet", **self.model}
        name, text = values.pop("name"), self.text
        require(name in NETWORKS, "model.name", name, ", ".join(NETWORKS))
        parts = [(part.max_tokens, part.dim) for part in text.parts]
        return typed(
            NETWORKS[name].config,
            values,
            "model.",
            text_dim=text.width,
            text_parts=tuple(parts) if len(parts) > 1 else (),
            pooling=text.pooling,
            sequence=text.sequence,
        )

    @functools.cached_property
    def full_size(self) -> int:
        """Side of the images that crops are taken from, pixels."""
        return self.data.image_size or self.unet.image_size

    @property
    def upscale(self) -> int:
        """By how much a super-resolution stage enlarges its low-resolution input; 1 for a base."""
        return self.unet.image_size // (self.unet.low_res or self.unet.image_size)

    def check_crop(self) -> None:
        """Raises UserError unless crops of the images can be taken, aligned to low-res pixels."""
        size, crop = self.data.image_size, self.unet.image_size
        allowed = f"0, or model.image_size={crop} or more in steps of {self.upscale}"
        fits = size == 0 or (size >= crop and size % self.upscale == 0)
        require(fits, "data.image_size", size, allowed)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to: the keys that its weights have their meaning from."""
        parts = {"text": self.text, "diffusion": self.diffusion, "model": self.unet}
        names = {
            "text": ("encoder", "dim", "pooling", "sequence"),
            "diffusion": ("schedule", "prediction"),
            "model": [f.name for f in dataclasses.fields(self.unet) if f.name not in NOT_WEIGHTS],
        }
        identity = {f"{s}.{n}": getattr(parts[s], n) for s in parts for n in names[s]} | {
            "model.name": self.model.get("name", "unet"),
            "optimizer.name": self.optimizer.name,
        }
        # The network has only seen noise levels within the bounds. The defaults are left out, so
        # that checkpoints written before these keys existed match them.
        d = self.diffusion
        if d.log_snr_min != process.LOG_SNR_MIN:
            identity["diffusion.log_snr_min"] = d.log_snr_min
        if d.log_snr_max != process.LOG_SNR_MAX:
            identity["diffusion.log_snr_max"] = d.log_snr_max
        return identity


def parse(config: Mapping[str, Any]) -> Config:
    """A ConfigDict, or nested dicts such as `config.json` holds, as typed fields.

    Raises:
      UserError: naming the key that is unknown, missing or out of range.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    parsed = typed(Config, values)
    parsed.check_crop()  # with it, model.*: a bad key must fail here, not at the first step
    return parsed
