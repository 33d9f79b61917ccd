"""Serves a web page that draws prompts with the released model, or with trained runs.

    python -m imagen_jax.demo
    python -m imagen_jax.demo --workdir=runs/demo
    python -m imagen_jax.demo --workdir=runs/demo,runs/demo_sr --port=8000

The page shows each picture as it is denoised, and repaints a part of it (inpainting). If the model
draws scenes, the page shows which claims of the caption the picture satisfies. Only this machine
can open the page unless --host says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from imagen_jax.common import cli, network
from imagen_jax.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from imagen_jax.pipeline.cascade import Cascade
    from imagen_jax.web.drawing import Check, Model

FLAGS = flags.FLAGS

EXAMPLES = 24


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    cli.define_cascade_flags(default="the model that ships with the package")
    flags.DEFINE_string("host", "127.0.0.1", "Address to serve the page at; 0.0.0.0 is all.")
    flags.DEFINE_integer(
        "port", 7860, "Port of the page; 0 takes a free one.", lower_bound=0, upper_bound=65535
    )
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Checks the flags, loads the model and serves the page."""
    del argv
    from imagen_jax.runs import workdir as runs

    workdirs = FLAGS.workdir or []
    for workdir in workdirs:
        runs.check_run(workdir)

    bound = network.listen(FLAGS.host, FLAGS.port)  # before the slow part, loading

    from imagen_jax.devices import compilation
    from imagen_jax.web import server

    compilation.use_cache(FLAGS.compilation_cache)
    model = open_model(workdirs, FLAGS.step)
    print(f"{network.url(FLAGS.host, bound)}  (Ctrl-C ends it)", flush=True)
    server.serve(model, bound, FLAGS.host)


def open_model(workdirs: Sequence[str | Path], step: int | None) -> Model:
    """Loads the runs, with example prompts and, for scenes, the check of claims.

    Args:
      workdirs: as for imagen_jax.load; none loads the released model.

    Raises:
      UserError: as for imagen_jax.load.
    """
    from imagen_jax.pipeline import cascade
    from imagen_jax.released import SCENES
    from imagen_jax.web.drawing import Model

    pipe = cascade.load(*workdirs, step=step)
    arguments = [f"--workdir={','.join(map(str, workdirs))}"] if workdirs else []
    arguments += [] if step is None else [f"--step={step}"]
    title = " + ".join(Path(w).name for w in workdirs) or SCENES.name
    if not pipe.stages[0].stage.config.data.task.startswith("scenes"):
        return Model(pipe, title, arguments, functools.cache(lambda: captions(pipe)))
    prompts, check = scenes(pipe)
    return Model(pipe, title, arguments, lambda: prompts, check)


def captions(pipe: Cascade) -> list[str]:
    """Returns captions of the first stage's data; none if this machine lacks them."""
    from data_pipelines.reading.check import check_dataset

    config = pipe.stages[0].stage.config
    try:
        check_dataset(config)
    except UserError as e:
        cli.log.info("the page offers no example prompts: %s", e)
        return []
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    examples = Reader(config).examples(config.data.sample_split, EXAMPLES)
    return [example["caption"] for example in examples]


def scenes(pipe: Cascade) -> tuple[list[str], Check]:
    """Returns held-out captions of scenes, and the check of any caption that can be parsed.

    The captions are those of the data's held-out split. They come from the grammar, so the data
    need not be on this machine.
    """
    from data_pipelines.scenes import check, claims, grammar, parse

    categories = pipe.stages[0].stage.config.data.categories
    drawn = (grammar.nth_scene(i, "heldout", categories=categories) for i in range(EXAMPLES))
    known = {scene.caption: scene.claims for scene in drawn if pipe.takes(scene.caption)}

    def verdicts(image: np.ndarray, prompt: str) -> list[tuple[str, bool]] | None:
        stated = known.get(prompt) or parse.claims_of(prompt)
        if stated is None or image.shape[0] < check.MIN_SIZE:
            return None
        return [(claims.in_words(v.claim), v.ok) for v in check.check_claims(image, stated)]

    return list(known), verdicts


if __name__ == "__main__":
    define_flags()
    cli.run(main)
