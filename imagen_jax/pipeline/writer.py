"""Samples a list of requests with a cascade and writes the pictures, resuming where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from imagen_jax.common import cli, pictures
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_text
from imagen_jax.diffusion.conditioning import pad_text
from imagen_jax.pipeline import cascade
from imagen_jax.pipeline.cascade import TrainedStage
from imagen_jax.pipeline.prompts import Request
from imagen_jax.text import TextEncoder, load_encoder


def condition(
    stage: TrainedStage, requests: list[Request], encoders: list[TextEncoder]
) -> dict[str, np.ndarray]:
    """What a stage is told of each request, on the host: text [N, T, D], text_mask [N, T], ...

    encoders: those of config.text.parts.
    """

    def encode(captions):
        embeddings = (encoder.encode(captions) for encoder in encoders)
        return pad_text(stage.stage.config.text.parts, *embeddings)

    sr = bool(stage.low_res)
    cond = encode([r.sr_prompt if sr else r.prompt for r in requests])
    if requests[0].to_prompt:
        end = encode([r.to_sr_prompt if sr else r.to_prompt for r in requests])
        f = np.array([r.fraction for r in requests])[:, None, None]
        mixed = (1 - f) * cond["text"] + f * end["text"]
        cond["text"] = mixed.astype(cond["text"].dtype)
        cond["text_mask"] |= end["text_mask"]
    if requests[0].negative_prompt:
        negative = encode([r.negative_prompt for r in requests])
        cond |= {f"negative_{k}": v for k, v in negative.items()}
    if requests[0].to_seed is not None:
        cond["to_seed"] = np.array([r.to_seed for r in requests], np.uint32)
        cond["fraction"] = np.array([r.fraction for r in requests], np.float32)
    return cond


def write_samples(
    stages: list[TrainedStage],
    requests: list[Request],
    given: dict[str, np.ndarray],
    out: Path,
    *,
    columns: int,
    all_stages: bool = False,
) -> None:
    """Draws what is not there yet, and writes it with samples.json, its settings, and grid.png."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror}") from e
    settings = {s.name: {"step": s.step, **dataclasses.asdict(s.sampler)} for s in stages}
    edit = {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in given.items()}
    about = {"stages": settings, **({"given_sha256": edit} if edit else {})}
    records = [json.dumps({**dataclasses.asdict(r), **about}) for r in requests]
    names = [f"{i:05d}.png" for i in range(len(requests))]
    folders = [out / f"{s.size}" for s in stages[:-1]] if all_stages else []
    folders.append(out)
    todo = [
        i
        for i, name in enumerate(names)
        if any(_record_of(folder / name) != records[i] for folder in folders)
    ]
    if len(todo) < len(names):
        cli.log.info("%d of %d are there already", len(names) - len(todo), len(names))
    for rows, images_by_stage in sample_batches(stages, requests, given, todo):
        for folder, images in zip(folders, images_by_stage[-len(folders) :], strict=True):
            for i, image in zip(rows, images, strict=True):
                _write(image, folder / names[i], requests[i], records[i])
    listed = [{"file": n, **json.loads(r)} for n, r in zip(names, records, strict=True)]
    write_text(out / "samples.json", json.dumps(listed, indent=1) + "\n")
    shown = names[: pictures.MOST_ON_A_SHEET]
    sheet = np.stack([_side_by_side([folder / name for folder in folders]) for name in shown])
    captions = [r.prompt for r in requests[: len(shown)]]
    pictures.save(pictures.grid(sheet, captions, columns=columns), out / "grid.png")
    print(out / "grid.png")


def sample_batches(
    stages: list[TrainedStage],
    requests: list[Request],
    given: dict[str, np.ndarray],
    todo: list[int],
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Some rows of `todo` at a time, and what each stage drew for them.

    Raises:
      UserError: a prompt longer than config.text.max_tokens, before anything is drawn.
    """
    if not todo:
        return
    load = functools.cache(load_encoder)  # stages usually share theirs, which may be large
    texts = [stage.stage.config.text for stage in stages]
    encoders = [[load(p.encoder, p.max_tokens) for p in text.parts] for text in texts]
    said = {v: None for r in requests for v in dataclasses.astuple(r) if isinstance(v, str)}
    for encoder in itertools.chain(*encoders):
        encoder.check(said)
    bars = {s.name: tqdm(total=len(todo), desc=s.name, unit="image") for s in stages}
    for start in range(0, len(todo), stages[0].batch_size):
        rows = todo[start : start + stages[0].batch_size]
        part = [requests[i] for i in rows]
        seeds = np.array([r.seed for r in part], np.uint32)
        # Encoded batch by batch: embeddings are much larger than the pictures drawn of them.
        conds = [condition(s, part, e) for s, e in zip(stages, encoders, strict=True)]
        yield rows, cascade.sample(stages, seeds, conds, given, lambda s, n: bars[s.name].update(n))
    for bar in bars.values():
        bar.close()


def _side_by_side(paths: list[Path]) -> np.ndarray:
    """Pictures in a row, enlarged to the size of the last without smoothing."""
    opened = [Image.open(path) for path in paths]
    size = opened[-1].size
    return np.hstack([np.asarray(i.resize(size, Image.Resampling.NEAREST)) for i in opened])


def _record_of(path: Path) -> str | None:
    """What a picture that is there already was drawn from."""
    try:
        with Image.open(path) as image:
            return image.info.get("request")
    except OSError:
        return None


def _write(image: np.ndarray, path: Path, request: Request, record: str) -> None:
    info = PngInfo()
    info.add_itxt("prompt", request.prompt)
    info.add_text("seed", str(request.seed))
    info.add_itxt("request", record)
    pictures.save(Image.fromarray(image), path, info)
