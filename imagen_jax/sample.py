"""Draws prompts with a trained run.

    python -m imagen_jax.sample --workdir=runs/demo --prompts="a red circle;two blue stars"

Writes one PNG a sample, with its prompt, seed and settings in its metadata, and grid.png.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from imagen_jax import cli, experiment, pictures
from imagen_jax.errors import UserError
from imagen_jax.run_config import TextConfig
from imagen_jax.text import load_encoder

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    flags.DEFINE_string("workdir", None, "A run of imagen_jax.train.")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
    flags.DEFINE_string("prompts", None, "Prompts, separated by semicolons.")
    flags.DEFINE_string("out", "samples", "Folder for the pictures.")
    flags.DEFINE_integer("seed", 0, "Seed of a prompt's first sample; the next counts on.", 0)
    flags.DEFINE_integer("num", 4, "Samples a prompt.", lower_bound=1)
    flags.DEFINE_float("guidance", None, "Guidance weight; the config's by default.")
    flags.DEFINE_integer("steps", None, "Sampling steps; the config's by default.")
    flags.DEFINE_string(
        "sampler", None, "ddim, ancestral, dpmpp_2m or heun; the config's otherwise."
    )


def main(argv: Sequence[str]) -> None:
    """Parses flags, draws, writes."""
    del argv
    prompts = [p.strip() for p in (FLAGS.prompts or "").split(";") if p.strip()]
    if not FLAGS.workdir or not prompts:
        raise UserError('--workdir=DIR and --prompts="a red circle" are both needed (see --help)')
    built, params = experiment.load(Path(FLAGS.workdir).absolute(), FLAGS.step)
    changes = {
        "guidance_weight": FLAGS.guidance,
        "num_steps": FLAGS.steps,
        "name": FLAGS.sampler,
    }
    given = {k: v for k, v in changes.items() if v is not None}
    sampler = dataclasses.replace(built.config.sampling, **given)

    cond = encode(built.config.text, prompts)
    repeated = {k: np.repeat(v, FLAGS.num, axis=0) for k, v in cond.items()}
    captions = [p for p in prompts for _ in range(FLAGS.num)]
    seeds = np.tile(np.arange(FLAGS.num, dtype=np.uint32), len(prompts)) + np.uint32(FLAGS.seed)
    with tqdm(total=len(captions), desc="drawing", unit="image") as bar:
        images = built.draw(params, seeds, repeated, sampler, progress=bar.update)
    settings = dataclasses.asdict(sampler)
    write(Path(FLAGS.out), images, captions, seeds, settings, columns=FLAGS.num)


def encode(text: TextConfig, prompts: list[str]) -> dict[str, np.ndarray]:
    """Prompts -> text bfloat16 [N, T, D] and text_mask [N, T], by the encoder of the training data.

    Raises:
      UserError: a prompt longer than config.text.max_tokens.
    """
    encoder = load_encoder(text.encoder, text.max_tokens)
    return text.pad(encoder.encode(prompts))


def write(
    out: Path,
    images: np.ndarray,
    captions: list[str],
    seeds: np.ndarray,
    settings: dict,
    columns: int,
) -> None:
    """A PNG for each image with its settings as text chunks, and the grid of all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror}") from e
    for i, (image, caption, seed) in enumerate(zip(images, captions, seeds, strict=True)):
        info = PngInfo()
        info.add_itxt("prompt", caption)
        info.add_text("seed", str(seed))
        info.add_text("sampling", json.dumps(settings))
        pictures.save(Image.fromarray(image), out / f"{i:05d}.png", info)
    pictures.save(pictures.grid(images, captions, columns=columns), out / "grid.png")
    print(out / "grid.png")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
