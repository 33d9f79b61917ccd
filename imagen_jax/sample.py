"""Draws prompts with a trained run, or with a whole cascade of them.

    python -m imagen_jax.sample --workdir=runs/demo --prompts="a red circle;two blue stars"
    python -m imagen_jax.sample --workdir=runs/base64,runs/sr256,runs/sr1024 --prompts_file=p.txt

Flags that say "a stage" take one value, or one for each workdir: --guidance=7,8,8. A call that was
interrupted goes on where it stopped: what is there already, with the same prompt, seed and
settings, is not drawn again.

Editing: --image with --strength draws a variation of a picture, --image with --mask paints a part
of it anew, --image with a super-resolution workdir enlarges it; --frames draws the way from one
prompt to another, or with --to_seed from one seed to another; --sr_prompts has the super-resolution
stages draw another prompt than the base (with --aug_level of about 0.3).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from imagen_jax import cascade, cli, experiment, pictures, prompts
from imagen_jax.errors import UserError
from imagen_jax.files import replacing
from imagen_jax.text import TextEncoder, load_encoder

FLAGS = flags.FLAGS

# Flags that change a stage's config section `sampling`: the flag, the key, the type, its help.
STAGE_FLAGS = (
    ("sampler", "name", str, "ddim, ancestral, dpmpp_2m or heun."),
    ("steps", "num_steps", int, "Sampling steps."),
    ("spacing", "spacing", str, "What the steps are evenly spaced in: t or log_snr."),
    ("guidance", "guidance_weight", float, "Guidance weight; 1 is none."),
    ("guidance_rescale", "guidance_rescale", float, "Guidance rescale, 0 to 1."),
    ("threshold", "threshold", str, "none, static or dynamic."),
    ("aug_level", "aug_level", float, "Noise on the low-resolution image, 0 to 1."),
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to draw: all that it depends on besides the stages and the image given."""

    prompt: str
    seed: int
    sr_prompt: str
    negative_prompt: str = ""
    to_prompt: str = ""
    to_seed: int | None = None
    fraction: float = 0.0


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    flags.DEFINE_list("workdir", None, "Runs of imagen_jax.train, in the order of the cascade.")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
    flags.DEFINE_string("prompts", "", "Prompts, separated by semicolons.")
    flags.DEFINE_string("prompts_file", "", "A prompt a line, or a .csv with a column 'prompt'.")
    flags.DEFINE_string("negative_prompt", "", "What guidance is to lead away from.")
    flags.DEFINE_string("sr_prompts", "", "What super-resolution is to draw; one, or as many.")
    flags.DEFINE_string("out", "samples", "Folder for the pictures.")
    flags.DEFINE_integer("seed", 0, "Seed of a prompt's first sample; the next counts on.", 0)
    flags.DEFINE_integer("num", 4, "Samples a prompt.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Drawn at once at 64x64; fewer when larger.", 1)
    flags.DEFINE_bool("all_stages", False, "Keep what every stage drew, in folders by size.")
    flags.DEFINE_bool("two_passes", False, "Guidance in two passes instead of one: less memory.")
    flags.DEFINE_list("guidance_interval", None, "LOW,HIGH: log-SNRs between which guidance acts.")
    for flag, _, _, help_text in STAGE_FLAGS:
        flags.DEFINE_list(flag, None, f"{help_text} A stage; the config's by default.")
    flags.DEFINE_string("image", "", "Picture to edit, or to enlarge: PNG, RGB, of the right size.")
    flags.DEFINE_string("mask", "", "Black and white PNG: white is painted anew (inpainting).")
    flags.DEFINE_integer("resample", 4, "With --mask: how often each step is taken (RePaint).", 1)
    flags.DEFINE_float("strength", 1.0, "With --image: 0 to 1, how much of it may change.")
    flags.DEFINE_integer("frames", 0, "Draw the way between two prompts or seeds in so many.", 0)
    flags.DEFINE_integer("to_seed", None, "With --frames: the seed at the end of the way.")
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Parses flags, draws, writes."""
    del argv
    if not FLAGS.workdir:
        raise UserError("--workdir=DIR is needed (see --help)")
    requests = make_requests(prompts.read_prompts(FLAGS.prompts, FLAGS.prompts_file))
    stages = [load_stage(i, Path(w).absolute()) for i, w in enumerate(FLAGS.workdir)]
    given = read_given(stages)
    cascade.check_order(stages, stages[0].low_res if "low_res" in given else None)
    load = functools.cache(load_encoder)  # stages usually share theirs, which may be large
    conds = [condition(stage, requests, load) for stage in stages]
    draw(stages, requests, conds, given, Path(FLAGS.out))


def make_requests(found: list[str]) -> list[Request]:
    """Each prompt with each seed; with --frames, each seed's way from its start to its end."""
    others = [p.strip() for p in FLAGS.sr_prompts.split(";")] if FLAGS.sr_prompts else found
    if len(others) not in (1, len(found)):
        raise UserError(f"--sr_prompts has {len(others)} prompts; allowed: 1 or {len(found)}")
    others = others * len(found) if len(others) == 1 else others
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.num)
    negative = FLAGS.negative_prompt
    if not FLAGS.frames:
        if FLAGS.to_seed is not None:
            raise UserError(f"--to_seed={FLAGS.to_seed} needs --frames, how many to draw")
        pairs = zip(found, others, strict=True)
        return [Request(p, s, o, negative) for p, o in pairs for s in seeds]
    if FLAGS.frames < 2 or len(found) > 2 or (len(found) == 1 and FLAGS.to_seed is None):
        raise UserError(
            f"--frames={FLAGS.frames} with {len(found)} prompts; allowed: 2 frames or more between "
            "2 prompts, or of 1 prompt with --to_seed"
        )
    return [
        Request(found[0], s, others[0], negative, found[-1], FLAGS.to_seed, float(f))
        for s in ([FLAGS.seed] if FLAGS.to_seed is not None else seeds)
        for f in np.linspace(0, 1, FLAGS.frames)
    ]


def load_stage(index: int, workdir: Path) -> cascade.Stage:
    """The stage of one workdir, with the settings that the flags give it."""
    changes: dict[str, Any] = {"guidance_batched": not FLAGS.two_passes}
    for flag, key, kind, _ in STAGE_FLAGS:
        values = FLAGS[flag].value
        if values is None:
            continue
        if len(values) not in (1, len(FLAGS.workdir)):
            allowed = f"1, or one for each of {len(FLAGS.workdir)} workdirs"
            raise UserError(f"--{flag} has {len(values)} values; allowed: {allowed}")
        changes[key] = _number(flag, values[index % len(values)], kind)
    if FLAGS.guidance_interval is not None:
        bounds = [_number("guidance_interval", v, float) for v in FLAGS.guidance_interval]
        changes["guidance_interval"] = tuple(bounds)
    if FLAGS.mask:
        changes["resample"] = FLAGS.resample
    elif index == 0 and FLAGS.image:
        changes["strength"] = FLAGS.strength
    built, params = experiment.load(workdir, FLAGS.step)
    sampler = dataclasses.replace(built.config.sampling, **changes)
    size = cascade.batch_size(built.config.full_size, FLAGS.batch_size)
    return cascade.Stage(workdir.name, built, params, sampler, size)


def _number(flag: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as e:
        raise UserError(f"--{flag} is {text!r}; it must be of type {kind.__name__}") from e


def read_given(stages: list[cascade.Stage]) -> dict[str, np.ndarray]:
    """What --image and --mask give: low_res to enlarge, or image (and mask) at the last size."""
    if not FLAGS.image:
        if FLAGS.mask:
            raise UserError(f"--mask={FLAGS.mask} needs --image, the picture that it is of")
        return {}
    if stages[0].low_res:
        return {"low_res": prompts.read_image("--image", FLAGS.image, stages[0].low_res)}
    size = stages[-1].size
    given = {"image": prompts.read_image("--image", FLAGS.image, size)}
    if FLAGS.mask:
        given["mask"] = prompts.read_mask("--mask", FLAGS.mask, size)
    elif FLAGS.strength == 1.0:
        raise UserError("--image needs --strength below 1 (try 0.6), or --mask")
    return given


def condition(
    stage: cascade.Stage, requests: list[Request], load: Callable[[str, int], TextEncoder]
) -> dict[str, np.ndarray]:
    """What a stage is told of each request, on the host: text [N, T, D], text_mask [N, T], ...

    Raises:
      UserError: a prompt longer than config.text.max_tokens.
    """
    text = stage.built.config.text
    encoder = load(text.encoder, text.max_tokens)

    def encode(captions):
        return text.pad(encoder.encode(captions))

    cond = encode([r.sr_prompt if stage.low_res else r.prompt for r in requests])
    if any(r.to_prompt for r in requests):
        end, f = encode([r.to_prompt for r in requests]), np.array([r.fraction for r in requests])
        mixed = (1 - f[:, None, None]) * cond["text"] + f[:, None, None] * end["text"]
        cond["text"] = mixed.astype(cond["text"].dtype)
        cond["text_mask"] |= end["text_mask"]
    if requests[0].negative_prompt:
        negative = encode([r.negative_prompt for r in requests])
        cond |= {f"negative_{k}": v for k, v in negative.items()}
    if requests[0].to_seed is not None:
        cond["to_seed"] = np.array([r.to_seed for r in requests], np.uint32)
        cond["fraction"] = np.array([r.fraction for r in requests], np.float32)
    return cond


def draw(
    stages: list[cascade.Stage],
    requests: list[Request],
    conds: list[dict[str, np.ndarray]],
    given: dict[str, np.ndarray],
    out: Path,
) -> None:
    """Draws what is not there yet, some at a time, and writes each picture as soon as it is drawn.

    Besides the pictures, `out` gets samples.json, their settings, and grid.png.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror}") from e
    settings = {s.name: dataclasses.asdict(s.sampler) for s in stages}
    edit = {k: getattr(FLAGS, k) for k in ("image", "mask") if getattr(FLAGS, k)}
    records = [json.dumps({**dataclasses.asdict(r), **edit, "stages": settings}) for r in requests]
    paths = [out / f"{i:05d}.png" for i in range(len(requests))]
    todo = [i for i, path in enumerate(paths) if _record_of(path) != records[i]]
    if len(todo) < len(paths):
        cli.log.info("%d of %d are there already", len(paths) - len(todo), len(paths))
    bars = {s.name: tqdm(total=len(todo), desc=s.name, unit="image") for s in stages if todo}
    for start in range(0, len(todo), stages[0].batch_size):
        rows = np.array(todo[start : start + stages[0].batch_size])
        seeds = np.array([requests[i].seed for i in rows], np.uint32)
        part = [{k: v[rows] for k, v in cond.items()} for cond in conds]
        drawn = cascade.draw(stages, seeds, part, given, lambda s, n: bars[s.name].update(n))
        for stage, images in zip(stages, drawn, strict=True):
            last = stage is stages[-1]
            for i, image in zip(rows, images, strict=True):
                if last or FLAGS.all_stages:
                    folder = out if last else out / f"{stage.size}"
                    _write(image, folder / paths[i].name, requests[i], records[i])
    for bar in bars.values():
        bar.close()
    listed = [{"file": p.name, **json.loads(r)} for p, r in zip(paths, records, strict=True)]
    with replacing(out / "samples.json") as temporary:
        temporary.write_text(json.dumps(listed, indent=1) + "\n")
    sheet = [np.asarray(Image.open(path)) for path in paths[: pictures.MOST_ON_A_SHEET]]
    captions = [r.prompt for r in requests[: len(sheet)]]
    columns = FLAGS.frames or FLAGS.num
    pictures.save(pictures.grid(np.stack(sheet), captions, columns=columns), out / "grid.png")
    print(out / "grid.png")


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


if __name__ == "__main__":
    define_flags()
    cli.run(main)
