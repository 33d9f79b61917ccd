"""Writes metrics to metrics.jsonl, TensorBoard and the log."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from clu import metric_writers, parameter_overview
from etils import epath

from imagen_jax.common.buckets import to_path
from imagen_jax.common.cli import log
from imagen_jax.common.files import write_text
from imagen_jax.devices import topologies
from imagen_jax.diffusion.loss import bucket_names
from imagen_jax.runs.mirror import Mirror
from imagen_jax.runs.workdir import BAD_RECORDS, METRICS, read_metrics
from imagen_jax.training.goodput import Goodput
from imagen_jax.training.reader import Reader


def overview(params: Any) -> str:
    """Returns CLU's table of parameters, at most 40 lines."""
    return parameter_overview.get_parameter_overview(params, include_stats=False, max_lines=40)


class MetricLogger:
    """Writer of step metrics, averaged between log lines; only process 0 writes metrics.

    Args:
      reader: its bad records are counted with the metrics, as those of this host, and every process
        lists its own in BAD_RECORDS.
      goodput: logged with the metrics.
      best_by: config.checkpoint.best_by.

    Attributes:
      folder: where files grow: the workdir, or a local folder if the workdir is in a bucket.
      step_time: seconds per step, as of the last log line; infinite before the first.
      saving: seconds that the loop stood still to save, since the last log line.
      scores: the metric `best_by` by step, negated if the highest is the best.
      written: names of the metrics of the step that the run resumed at; only process 0 has them.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        num_steps: int,
        batch_size: int,
        flops_per_step: float,
        reader: Reader | None = None,
        goodput: Goodput | None = None,
        best_by: str = "",
    ):
        self._main = jax.process_index() == 0
        own = BAD_RECORDS.format(process=jax.process_index())
        self._mirror = Mirror(to_path(workdir), [METRICS] * self._main + [own])
        self.folder = self._mirror.folder
        self._path = self.folder / METRICS
        self._num_steps, self._batch_size, self._reader = num_steps, batch_size, reader
        self._flops, self._goodput, self._best_by = flops_per_step, goodput, best_by
        self.saving, self.scores, self.written = 0.0, {}, set()
        self._peak = topologies.device_peak_flops() * jax.device_count()
        self.writer = metric_writers.create_default_writer(
            self.folder, just_logging=not self._main, asynchronous=False
        )
        self.step_time = math.inf
        self._window: list[dict[str, np.ndarray]] = []
        self._resumed: list[dict[str, np.ndarray]] = []
        self._untimed = 0
        self._paused = self._waited = 0.0
        self._start = time.perf_counter()

    @property
    def window(self) -> list[dict[str, Any]]:
        """The metrics of the steps since the last log line, as plain numbers."""
        return [{name: value.tolist() for name, value in m.items()} for m in self._window]

    def resume_at(self, step: int, window: Sequence[dict[str, Any]] = ()) -> None:
        """Drops lines after `step`, which a run wrote after the checkpoint that it goes back to.

        Args:
          window: `window` as of the checkpoint, so that the next line averages the same steps.
        """
        self._resumed = [
            {k: np.asarray(v, bool if isinstance(v, bool) else np.float32) for k, v in m.items()}
            for m in window
        ]
        if not self._main or not self._path.exists():
            return
        kept = [line for line in read_metrics(self._path.parent) if line["step"] <= step]
        self.written = {name for line in kept if line["step"] == step for name in line}
        self.scores.clear()
        for line in kept:
            self._score(line["step"], line)
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """Adds the metrics of one step to the averages; returns them as host arrays."""
        self._window.append(jax.device_get(metrics))
        return self._window[-1]

    def flush(self, step: int) -> None:
        """Writes the averages since the last call, as those of `step`."""
        timed = len(self._window) - self._untimed
        seconds = (time.perf_counter() - self._start - self._paused) / timed
        self.step_time = seconds
        taken = [m for m in self._window if not m["skipped"]]
        scalars = _averages(taken)
        if skipped := len(self._window) - len(taken):
            scalars["skipped_steps"] = skipped
        scalars |= {"step_time": seconds, "images_per_s": self._batch_size / seconds}
        scalars["data_wait"] = self._waited / (seconds * timed)
        if self.saving:
            scalars["checkpoint_delay"] = self.saving
            self.saving = 0.0
        scalars |= self._goodput.metrics() if self._goodput else {}
        scalars |= self._bad_records()
        if self._peak:
            scalars["mfu"] = self._flops / seconds / self._peak
        self.write(step, scalars)
        eta = seconds * (self._num_steps - step)
        log.info(
            "step %d/%d  loss %.4f  %.1f images/s  ETA %s",
            step, self._num_steps, scalars.get("loss", math.nan), scalars["images_per_s"],
            duration(eta),
        )  # fmt: skip
        self.restart_clock()

    def restart_clock(self) -> None:
        """Discards the averages, other than those of `resume_at`, and restarts the timing."""
        self._window, self._resumed = self._resumed, []
        self._untimed = len(self._window)
        self._paused = self._waited = 0.0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the block from the step time; for samples, evaluation and checkpoints."""
        before = time.perf_counter()
        yield
        self._paused += time.perf_counter() - before

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as time in which the loop waits for data."""
        before = time.perf_counter()
        with self._goodput.spending("data") if self._goodput else contextlib.nullcontext():
            yield
        self._waited += time.perf_counter() - before

    def _bad_records(self) -> dict[str, float]:
        """Lists new bad records; returns the counts by reason since the start of the process."""
        counts, entries = self._reader.take_bad_records() if self._reader else ({}, [])
        if entries:
            path = self._path.parent / BAD_RECORDS.format(process=jax.process_index())
            with path.open("a") as f:
                f.writelines(json.dumps(entry) + "\n" for entry in entries)
        return {f"bad_records/{k.replace(' ', '_')}": float(n) for k, n in counts.items()}

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of a step to metrics.jsonl and TensorBoard."""
        self.writer.write_scalars(step, scalars)
        self._score(step, scalars)
        if self._main:
            with self._path.open("a") as f:
                f.write(json.dumps({"step": step, **scalars}) + "\n")
        if self._mirror.due():
            self.upload()

    def upload(self) -> None:
        """Uploads what was written so far, if the workdir is in a bucket."""
        self.writer.flush()
        self._mirror.upload()

    def _score(self, step: int, scalars: dict[str, float]) -> None:
        name = self._best_by.removeprefix("-")
        if name in scalars:
            self.scores[step] = scalars[name] if name == self._best_by else -scalars[name]

    def close(self) -> None:
        """Flushes the writers."""
        self.writer.close()
        self._mirror.close()


def _averages(steps: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Returns the mean loss and gradient norm of steps, and the mean loss per log-SNR bucket."""
    if not steps:
        return {}
    scalars = {k: float(np.mean([m[k] for m in steps])) for k in ("loss", "grad_norm")}
    sums, counts = (np.sum([m[k] for m in steps], 0) for k in ("bucket_loss", "bucket_count"))
    for name, loss, count in zip(bucket_names(), sums, counts, strict=True):
        if count:
            scalars[f"loss_log_snr/{name}"] = float(loss / count)
    return scalars


def duration(seconds: float) -> str:
    """Formats seconds as 1h02m, 3m05s or 12s."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"
