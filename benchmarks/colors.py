"""Measures how exactly super-resolution keeps the colors of the image that it enlarges.

    python -m benchmarks.colors

The mean of the pixels that a low-resolution pixel became should be that pixel. For each stage of a
cascade and each noise level of its input, the command prints the mean absolute difference, and the
mean difference by channel, which shows a tint; in gray levels (0 to 255), over held-out scenes.
"""

from __future__ import annotations

import itertools

import numpy as np
from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_cascade_flags(default="the model that ships with the package")
    flags.DEFINE_integer("num", 32, "Number of captions, one image each.", lower_bound=1)
    flags.DEFINE_list("aug_level", [0.0, 0.1, 0.3], "Noise levels of the low-resolution input.")


def main(argv: list[str]) -> None:
    """Samples the captions at each noise level and prints a table."""
    del argv
    levels = cli.parse_numbers("aug_level", FLAGS.aug_level)
    import imagen_jax
    from data_pipelines.scenes.grammar import nth_scene
    from imagen_jax.diffusion.conditioning import shrink

    pipe = imagen_jax.load(*(FLAGS.workdir or ()), step=FLAGS.step)
    if len(pipe.stages) == 1:
        raise UserError("--workdir names one stage; it needs a cascade with super-resolution")
    captions = [nth_scene(i, "heldout").caption for i in range(FLAGS.num)]
    captions = [c for c in captions if pipe.takes(c)]
    print("| stage | aug_level | mean difference | red | green | blue |\n|---|---|---|---|---|---|")
    for level in levels:
        outputs = pipe(captions, seed=0, aug_level=level, return_stages=True, progress=False)
        arrays = [np.stack([np.asarray(image) for image in images]) for images in outputs]
        for low, high in itertools.pairwise(arrays):
            difference = shrink(high.astype(np.float64), low.shape[1]) - low
            tint = " | ".join(f"{c:+.2f}" for c in difference.mean((0, 1, 2)))
            size = high.shape[1]
            print(f"| {size}x{size} | {level:g} | {np.abs(difference).mean():.2f} | {tint} |")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
