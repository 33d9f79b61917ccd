"""Every config key, typed.

`parse` converts the keys of a config file to these dataclasses once, at the start. Sections that
belong to one module are defined there: model, optimizer, sampling, mesh.
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
from imagen_jax.diffusion.loss import TimeSampling, check_weighting
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.ema import EmaConfig
from imagen_jax.models.denoiser import POOLING, SEQUENCE, NetworkConfig
from imagen_jax.models.networks import NETWORKS

CROPS = ("center", "random")
# Fields of the network's config that may differ between a checkpoint and the run that reads it, or
# that follow from the sections `text` and `diffusion`.
NOT_WEIGHTS = (
    *("dtype", "dropout", "scan_blocks"),
    *("text_dim", "text_parts", "pooling", "sequence", "head"),
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Config section `text`: the frozen encoder, and how the network reads it (sections 2.1, 2.5).

    Attributes:
      encoder: the name recorded with the data's embeddings, such as "byte-tiny" or "t5-v1_1-xxl".
        Several names joined by "+" concatenate the encoders' tokens; dim and max_tokens are then
        tuples.
      dim: width of the embeddings; 4096 for T5-XXL.
      max_tokens: number of tokens that embeddings are padded to; longer captions are an error. The
        T5 recipes have 128.
      pooling: how the text is pooled into a vector, which is added to the time embedding:
        "attention", "mean" or "none".
      sequence: how the network attends to the tokens: "cross_attention_layernorm",
        "cross_attention" or "none".
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
            allowed = f"{len(names)} number(s), one per encoder in text.encoder"
            require(fits, f"text.{key}", value, allowed)
            require(min((value,) if one else value) > 0, f"text.{key}", value, "1 or more")

    @property
    def parts(self) -> tuple[TextPart, ...]:
        """The encoders, in the order of their tokens."""
        names = self.encoder.split("+")
        if len(names) == 1:
            return (TextPart(self.encoder, self.dim, self.max_tokens),)
        return tuple(map(TextPart, names, self.dim, self.max_tokens))

    @property
    def width(self) -> int:
        """Width D of the text: the largest dim."""
        return max(part.dim for part in self.parts)

    @property
    def tokens(self) -> int:
        """Number of tokens T of the text: the sum of max_tokens."""
        return sum(part.max_tokens for part in self.parts)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Config section `diffusion`: the forward process and what the network predicts.

    Attributes:
      schedule: a key of process.SCHEDULES.
      log_snr_min, log_snr_max: bounds of the schedule's log-SNR, at t = 1 and t = 0.
      schedule_shift: added to the schedule's log-SNR; 2 log(64 / d) for images of side d makes them
        look as noisy as images of side 64 do. See process.Schedule; 0 in the paper.
      prediction: a key of process.PREDICTIONS.
      weighting: a key of loss.WEIGHTINGS.
      weighting_bias: log-SNR at which the weightings "sigmoid" and "sqrt_v" turn.
      time_sampling: how training draws noise levels, a key of loss.TIME_SAMPLING. The held-out loss
        always draws t uniformly, so that it compares between runs.
      time_mean, time_std: mean and standard deviation of logit(t) for "logit_normal", and of the
        log-SNR for "log_snr_normal". All log-SNRs stay within the bounds.
      caption_dropout: probability of training on the null prompt, which guidance needs; 0.1 in the
        paper.
      low_discrepancy: spread the times of a batch evenly over [0, 1], or over the quantiles of
        time_sampling; the distribution of each stays the same.
    """

    schedule: str = "cosine"
    log_snr_min: float = process.LOG_SNR_MIN
    log_snr_max: float = process.LOG_SNR_MAX
    schedule_shift: float = 0.0
    prediction: str = "eps"
    weighting: str = "eps"
    weighting_bias: float = 0.0
    time_sampling: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    caption_dropout: float = 0.1
    low_discrepancy: bool = False

    def __post_init__(self):
        process.Schedule(self.schedule, self.log_snr_min, self.log_snr_max, self.schedule_shift)
        process.lookup(process.PREDICTIONS, "diffusion.prediction", self.prediction)
        check_weighting(self.weighting, self.weighting_bias)
        TimeSampling(self.time_sampling, self.time_mean, self.time_std)
        p = self.caption_dropout
        require(0 <= p <= 1, "diffusion.caption_dropout", p, "0 to 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Config section `data`, which data_pipelines.reading reads.

    Attributes:
      task: a SeqIO task or mixture (see data_pipelines.reading.tasks), the name of a dataset in
        `dir`, or "mixture".
      mixture: tasks and their weights, such as {"folder": 0.7, "emoji": 0.3}, for task="mixture".
        Each is read as often as its weight says, whatever its size.
      dir: folder of the prepared datasets.
      embeddings: embedding store of the captions; "" reads the embeddings that were prepared with
        the data. With several text encoders, one store per encoder, joined by "+".
      categories: use only captions of these categories, such as ("Colors",), in training,
        evaluation, sample grids and `build`; () means all.
      eval_split: split for the held-out loss.
      sample_split: split whose first captions are sampled during training.
      build: draw the scenes if they are missing (scenes tasks only).
      num_train: number of training scenes that `build` draws.
      image_size: side that images are resized to before training takes random crops of
        model.image_size; 0 means model.image_size, without crops. The paper's second
        super-resolution model trains on crops of 256 from 1024 (section 2.5).
      crop: the square that is taken of an image in training: "center", or "random" in place and
        size. Evaluation takes the center.
      min_crop_scale: with crop="random", the least side of the square as a share of the shorter
        side. Squares smaller than the resolution are not taken, because nothing is enlarged.
      flip: mirror half of the training images. Captions say left and right, so think first.
      shuffle_window: 0 shuffles all records of an epoch, reading one at a time. A multiple of 16
        reads runs of 16 neighbors instead and spreads them over a window of so many examples, for
        slow disks and buckets (reading.order). All hosts together hold a window of encoded records.
      max_bad_share: share of bad records (damaged, too small, without an embedding) that stops a
        run. Fewer are replaced by other records, counted in the metrics and listed in the workdir.
      in_memory: decode all training images once, at the start, and keep them in memory. Useful if
        they are few or the CPU is busy. Every host holds all of them.
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
    mixture: dict = dataclasses.field(default_factory=dict)
    crop: str = "center"
    min_crop_scale: float = 1.0
    flip: bool = False
    shuffle_window: int = 0
    max_bad_share: float = 0.01
    in_memory: bool = False

    def __post_init__(self):
        weights = list(self.mixture.values())
        positive = all(isinstance(w, (int, float)) and w > 0 for w in weights)
        allowed = "task names with weights above 0, at most 4096"
        require(positive and len(weights) <= 4096, "data.mixture", self.mixture, allowed)
        allowed = "names with data.task='mixture', {} with any other task"
        fits = bool(weights) == (self.task == "mixture")
        require(fits, "data.mixture", self.mixture, allowed)
        require(self.crop in CROPS, "data.crop", self.crop, ", ".join(CROPS))
        scale, share, window = self.min_crop_scale, self.max_bad_share, self.shuffle_window
        least = "above 0, up to 1" if self.crop == "random" else "1 with data.crop='center'"
        fits = 0 < scale <= 1 if self.crop == "random" else scale == 1
        require(fits, "data.min_crop_scale", scale, least)
        require(0 <= share < 1, "data.max_bad_share", share, "0 or more, below 1")
        allowed = "0, or a multiple of 16"
        require(window >= 0 and window % 16 == 0, "data.shuffle_window", window, allowed)
        whole = self.crop == "center" or not self.in_memory
        require(whole, "data.in_memory", self.in_memory, "false with data.crop='random'")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Config section `checkpoint`.

    Attributes:
      max_to_keep: number of newest checkpoints to keep.
      keep_every: also keep every checkpoint at a multiple of this many steps; 0 turns this off.
    """

    max_to_keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        require(self.max_to_keep > 0, "checkpoint.max_to_keep", self.max_to_keep, "1 or more")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 or more")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Config section `guard`: what training does if the loss or the gradients are not finite.

    Such a step changes nothing but the step counter. After too many in a row, the run goes back to
    its newest checkpoint and on with the data that follow.

    Attributes:
      max_skips: steps that may be skipped in a row.
      max_rollbacks: times that the run may go back to the same checkpoint; the next ends it.
      spike_factor: a step is logged if its loss is above this many times the 90% quantile of the
        last 200 losses; 0 turns this off.
    """

    max_skips: int = 20
    max_rollbacks: int = 2
    spike_factor: float = 4.0

    def __post_init__(self):
        for key in ("max_skips", "max_rollbacks", "spike_factor"):
            require(getattr(self, key) >= 0, f"guard.{key}", getattr(self, key), "0 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    """All config keys.

    Attributes:
      seed: seed of the weights, the order of the data and all noise.
      num_steps: steps of the whole run.
      batch_size: examples per step, over all devices.
      data, text, diffusion, optimizer, sampling, mesh, checkpoint, ema, guard: the sections.
      model: the network's keys, untyped; see `unet`.
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
    checkpoint: CheckpointConfig = CheckpointConfig()
    ema: EmaConfig = EmaConfig()
    guard: GuardConfig = GuardConfig()

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
        return typed(network, values, "model.", **{k: v for k, v in derived.items() if k in fields})

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
            "model": [f.name for f in dataclasses.fields(self.unet) if f.name not in NOT_WEIGHTS],
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
    parsed.check_crop()  # also parses model.*, so that a bad key fails here, not at the first step
    return parsed
