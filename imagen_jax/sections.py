"""The config sections that belong to no other module; config.py puts all of them together."""

from __future__ import annotations

import dataclasses
import re

from imagen_jax.common.typed_config import require
from imagen_jax.diffusion import process
from imagen_jax.diffusion.conditioning import TextPart
from imagen_jax.diffusion.loss import TimeSampling, check_weighting
from imagen_jax.models.denoiser import POOLING, SEQUENCE

CROPS = ("center", "random")
INIT_WEIGHTS = ("ema", "raw")


def _are_weights(values: dict) -> bool:
    return all(isinstance(w, (int, float)) and w > 0 for w in values.values())


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
      caption_weights: names of captions and their weights, such as {"caption": 0.3, "rewritten":
        0.7}, for images that have captions from several columns or models. In each epoch, an image
        is trained with a caption of one name, drawn by weight among those that it has. Captions of
        other names are not used. {} draws from all captions alike.
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
    caption_weights: dict = dataclasses.field(default_factory=dict)
    crop: str = "center"
    min_crop_scale: float = 1.0
    flip: bool = False
    shuffle_window: int = 0
    max_bad_share: float = 0.01
    in_memory: bool = False

    def __post_init__(self):
        allowed = "task names with weights above 0, at most 4096"
        fits = _are_weights(self.mixture) and len(self.mixture) <= 4096
        require(fits, "data.mixture", self.mixture, allowed)
        allowed = "names with data.task='mixture', {} with any other task"
        fits = bool(self.mixture) == (self.task == "mixture")
        require(fits, "data.mixture", self.mixture, allowed)
        allowed = (
            "names of captions with weights above 0, such as {'caption': 0.3, 'rewritten': 0.7}"
        )
        fits = _are_weights(self.caption_weights)
        require(fits, "data.caption_weights", self.caption_weights, allowed)
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
class InitConfig:
    """Config section `init`: the run whose weights this one starts from (a warm start).

    It counts only as long as this run has no checkpoint. An array is loaded if its name and shape
    are those of an array here; see runs.warm_start.

    Attributes:
      workdir: the workdir of that run, followed by ":STEP" for a checkpoint other than the newest;
        "" starts from random weights.
      weights: "ema", or "raw" for the weights without averaging.
      only: regular expression; only arrays whose names contain a match are loaded, such as
        "^conditioner" or "^(down|middle|up)". "" loads all.
    """

    workdir: str = ""
    weights: str = "ema"
    only: str = ""

    def __post_init__(self):
        allowed = ", ".join(INIT_WEIGHTS)
        require(self.weights in INIT_WEIGHTS, "init.weights", self.weights, allowed)
        require(bool(self.workdir) or not self.only, "init.only", self.only, "'' without workdir")
        try:
            re.compile(self.only)
            valid = True
        except (re.error, RecursionError, OverflowError):
            valid = False
        require(valid, "init.only", self.only, "a regular expression, such as '^conditioner'")

    @property
    def source(self) -> tuple[str, int | None]:
        """The workdir, and the step or None for the newest."""
        workdir, _, step = self.workdir.rpartition(":")
        if workdir and re.fullmatch(r"\d{1,12}", step, re.ASCII):
            return workdir, int(step)
        return self.workdir, None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Config section `checkpoint`.

    Attributes:
      every_s: also save at the first log line that comes this many seconds after the last save; 0
        turns this off. Process 0's clock decides for all.
      max_to_keep: number of newest checkpoints to keep.
      keep_every: also keep every checkpoint at a multiple of this many steps; 0 turns this off.
      keep_best: also keep this many checkpoints, those with the best `best_by`.
      best_by: a metric that training logs at the steps of checkpoints, the lowest being the best;
        "-" before the name makes it the highest.
      local_dir: folder on a local disk of each host, for local checkpoints: each process saves its
        own shards there, and a restart takes them if they are newer than the checkpoints in the
        workdir. "" turns this off.
      local_every: steps between local checkpoints; each checkpoint in the workdir adds one.
    """

    every_s: float = 0.0
    max_to_keep: int = 3
    keep_every: int = 0
    keep_best: int = 0
    best_by: str = "eval_loss"
    local_dir: str = ""
    local_every: int = 100

    def __post_init__(self):
        require(self.max_to_keep > 0, "checkpoint.max_to_keep", self.max_to_keep, "1 or more")
        for key in ("every_s", "keep_every", "keep_best"):
            require(getattr(self, key) >= 0, f"checkpoint.{key}", getattr(self, key), "0 or more")
        require(self.local_every > 0, "checkpoint.local_every", self.local_every, "1 or more")
        local = "://" not in self.local_dir
        require(local, "checkpoint.local_dir", self.local_dir, "a folder on a local disk, or ''")
        named = bool(self.best_by.removeprefix("-"))
        require(named, "checkpoint.best_by", self.best_by, "the name of a metric, or - and a name")


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
class EvalConfig:
    """An entry of the config section `evals`: a metric that training measures every few steps.

    Attributes:
      every: steps between evaluations; the last step evaluates too.
      num: number of captions to sample, the first ones of the split.
      split: split of the captions; "" means data.sample_split.
      guidance: guidance weight; None means sampling.guidance_weight.
    """

    every: int
    num: int = 64
    split: str = ""
    guidance: float | None = None

    def check(self, name: str) -> None:
        """Raises UserError if a value of evals.<name> is out of range."""
        for key in ("every", "num"):
            require(getattr(self, key) > 0, f"evals.{name}.{key}", getattr(self, key), "1 or more")
        weight = self.guidance
        require(weight is None or weight >= 0, f"evals.{name}.guidance", weight, "0 or more")
