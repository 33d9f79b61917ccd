"""Metrics that compare samples with reference images, or with captions, through frozen networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.intervals import wilson
from imagen_jax.evaluation import distances, scores
from imagen_jax.evaluation.features import CaptionExtractor, Extractor
from imagen_jax.evaluation.metric import Example, Metric, Row, Table
from imagen_jax.evaluation.networks import inception, table
from imagen_jax.evaluation.networks.table import Network
from imagen_jax.evaluation.reference import Reference, Source

FEW = 10_000  # below, scores are biased; published figures have 10,000 to 50,000 samples
UNBIASED = ("kid", "clip_score")  # whatever the number of samples
SEED = 2020  # torch-fidelity's, so that subsets and shuffles are the same
NEIGHBORS = 3
SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
RESAMPLES = 200
FRECHET_RESAMPLES = 20  # each takes the eigenvalues of a D x D matrix


def frechet(features: np.ndarray, against: Reference) -> Row:
    """Returns the Frechet distance and, from FEW samples on, its limit for infinitely many."""
    num = len(features)
    draws = [np.arange(num), *distances.resample(num, FRECHET_RESAMPLES, SEED)]
    value, *resampled = distances.frechet_of_draws(features, against.moments, draws)
    row = _row(value, resampled)
    if num >= FEW:
        row["infinity"] = distances.frechet_at_infinity(features, against.moments, SEED)
    return row


def kid(features: np.ndarray, against: Reference) -> Row:
    """Returns the Kernel Inception Distance."""
    size = min(SUBSET_SIZE, len(features), len(against.features))
    value = distances.kid(features, against.features, SUBSETS, size, SEED)
    counts = distances.resample_counts(len(features), RESAMPLES, SEED)
    resampled = distances.kid_of_counts(features, against.features, counts)
    return {**_row(value, resampled), "subset_size": size}


def precision_recall(features: np.ndarray, against: Reference) -> Row:
    """Returns precision as "value", and recall; Wilson intervals, given the other set."""
    value, recall = scores.precision_recall(features, against.features, NEIGHBORS)
    low, high = wilson(round(value * len(features)), len(features))
    num = len(against.features)
    recall_low, recall_high = wilson(round(recall * num), num)
    recalls = {"recall": recall, "recall_low": recall_low, "recall_high": recall_high}
    return {"value": value, "low": low, "high": high, **recalls}


def cmmd(features: np.ndarray, against: Reference) -> Row:
    """Returns CMMD."""
    counts = distances.resample_counts(len(features), RESAMPLES, SEED)
    counts = np.concatenate([np.ones((1, len(features))), counts])
    value, *resampled = distances.cmmd_of_counts(features, against.features, counts)
    return _row(value, resampled)


def inception_score(logits: np.ndarray) -> Row:
    """Returns the Inception score."""
    value = scores.inception_score(logits, min(SPLITS, len(logits)), SEED)
    counts = distances.resample_counts(len(logits), RESAMPLES, SEED)
    return _row(value, scores.inception_scores(logits, counts))


def clip_score(images: np.ndarray, captions: np.ndarray) -> Row:
    """Returns the mean CLIP score."""
    each = scores.clip_scores(images, captions)
    counts = distances.resample_counts(len(each), RESAMPLES, SEED)
    return _row(each.mean(), counts @ each / len(each))


def _row(value: float, resampled: Sequence[float]) -> Row:
    low, high = distances.interval(float(value), resampled)
    return {"value": float(value), "low": low, "high": high}


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What `metrics` makes a Metric of.

    Attributes:
      compare: (features, Reference) -> Row; None if the metric needs no reference.
      settings: the part of the protocol that is the same for all runs.
      full: whether the reference's features are needed, not only its moments.
    """

    network: Network
    title: str
    note: str
    digits: int
    compare: Callable[[np.ndarray, Reference], Row] | None
    settings: dict[str, Any]
    full: bool = True


_LOW = "Lower is better. Only values with the same number of samples and reference compare."
_BOOTSTRAP = {"interval": "bootstrap standard error of samples", "seed": SEED}
_FRECHET = {**_BOOTSTRAP, "resamples": FRECHET_RESAMPLES}
_RESAMPLED = {**_BOOTSTRAP, "resamples": RESAMPLES}
_SPECS = {
    "fid": _Spec(
        table.INCEPTION, "FID", f"Frechet distance of Inception features. {_LOW}", 2,
        frechet, _FRECHET, full=False,
    ),
    "kid": _Spec(
        table.INCEPTION, "KID", f"Kernel distance of Inception features. {_LOW}", 5, kid,
        {**_RESAMPLED, "subsets": SUBSETS, "subset_size": f"{SUBSET_SIZE}, or all if fewer"},
    ),
    "precision_recall": _Spec(
        table.INCEPTION, "Precision and recall",
        "Share of samples among the true images, and of true images among the samples, by the "
        "distance to the third neighbor.", 3, precision_recall,
        {"interval": "Wilson", "neighbors": NEIGHBORS},
    ),
    "inception_score": _Spec(
        table.INCEPTION, "Inception score",
        "How clearly and how variedly an ImageNet classifier reads the samples. Higher is better.",
        2, None, {**_RESAMPLED, "splits": SPLITS},
    ),
    "fd_dinov2": _Spec(
        table.DINOV2, "FD-DINOv2", f"Frechet distance of DINOv2 features. {_LOW}", 2,
        frechet, _FRECHET, full=False,
    ),
    "cmmd": _Spec(
        table.CLIP_336, "CMMD", f"Kernel distance of CLIP embeddings, times 1000. {_LOW}", 3, cmmd,
        {**_RESAMPLED, "sigma": distances.CMMD_SIGMA, "scale": distances.CMMD_SCALE},
    ),
    "clip_score": _Spec(
        table.CLIP, "CLIP score",
        "100 times the cosine of an image and its caption, mean. Higher is better.", 2, None,
        _RESAMPLED,
    ),
    "fd_efficientnet": _Spec(
        table.EFFICIENTNET, "FD-EfficientNet",
        "Frechet distance of EfficientNet-Lite0 features; no published figure compares with it. "
        f"{_LOW}", 2, frechet, _FRECHET, full=False,
    ),
}  # fmt: skip
NAMES = tuple(_SPECS)
WITH_REFERENCE = tuple(name for name, spec in _SPECS.items() if spec.compare)


def metrics(
    names: Sequence[str], folder: Path | None = None, reference: Path | None = None
) -> dict[str, Metric]:
    """Returns metrics by name, after checking all that they need. Weights are read on first use.

    Args:
      names: of NAMES.
      folder: the folder of weights (default: table.DEFAULT_FOLDER), which also has the cache.
      reference: a folder of images, or a .npz file of statistics (default: the examples' own
        images).

    Raises:
      UserError: a name is unknown, the file of a network is missing or has another network, or the
        reference cannot serve the metrics.
    """
    for name in names:
        if name not in _SPECS:
            raise UserError(f"--metrics has {name!r}; allowed: {', '.join(NAMES)}")
    cache = Path(folder or table.DEFAULT_FOLDER).expanduser() / "references"
    source = Source(reference, cache)
    extractors: dict[str, Extractor] = {}
    found = {}
    for name in names:
        spec, network = _SPECS[name], _SPECS[name].network
        if network.name not in extractors:
            extractors[network.name] = Extractor(network, name, folder)
        if spec.compare:
            source.check(name, network, spec.full)
        found[name] = _metric(name, extractors[network.name], source)
    return found


def _compare(
    name: str, extractor: Extractor, source: Source, protocol: dict[str, Any]
) -> Callable[[np.ndarray, Sequence[np.ndarray], Sequence[Example]], Row]:
    """Returns the function that scores (features, images, examples)."""
    if name == "inception_score":
        classifier = inception.read_classifier(extractor.path)
        return lambda features, images, examples: inception_score(features @ classifier)
    if name == "clip_score":
        read = CaptionExtractor(extractor.path)
        return lambda features, images, examples: clip_score(
            features, read([example["caption"] for example in examples])
        )

    def compare(features, images, examples):
        against = source.get(name, extractor, images[0].shape[0], examples)
        protocol["reference"] = against.protocol
        return _SPECS[name].compare(features, against)

    return compare


def _metric(name: str, extractor: Extractor, source: Source) -> Metric:
    spec, network = _SPECS[name], extractor.network
    protocol = {
        "network": network.name,
        "weights": extractor.path.name,
        "weights_sha256": extractor.sha256,
        "size": network.size,
        "resize": network.resize,
        **spec.settings,
    }
    compare = _compare(name, extractor, source, protocol)
    warned = set()

    def measure(images: Sequence[np.ndarray], examples: Sequence[Example]) -> Table:
        least = NEIGHBORS + 1 if name == "precision_recall" else 2
        if len(images) < least:
            raise UserError(f"--metrics={name} needs {least} samples or more; found {len(images)}")
        if len(images) < FEW and len(images) not in warned and name not in UNBIASED:
            warned.add(len(images))
            log.warning(
                "%s of %d samples depends on their number; published figures have 10,000 to 50,000",
                name, len(images),
            )  # fmt: skip
        row = compare(extractor(images), images, examples)
        return {"all": {**row, "num": len(images)}}

    def cell(row: Row) -> str:
        text = _interval(row, ("value", "low", "high"), spec.digits)
        if "recall" in row:
            recall = _interval(row, ("recall", "recall_low", "recall_high"), spec.digits)
            text = f"precision {text}, recall {recall}"
        if "infinity" in row:
            text += f", {row['infinity']:.{spec.digits}f} for infinitely many"
        return f"{text}, {row['num']:,} samples"

    return Metric(spec.title, spec.note, measure, cell, protocol)


def _interval(row: Row, keys: tuple[str, str, str], digits: int) -> str:
    value, low, high = (f"{row[key]:.{digits}f}" for key in keys)
    return f"{value} ({low} to {high})"
