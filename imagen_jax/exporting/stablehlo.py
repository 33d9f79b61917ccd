"""Programs in StableHLO, which any later JAX runs on CPUs, GPUs and TPUs without this code.

The weights are inputs, in the safetensors file beside the programs: both programs share it, and a
program with the weights inside would be limited to 2 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.exporting import programs
from imagen_jax.pipeline.trained import TrainedStage
from imagen_jax.runs import exported

PLATFORMS = ("cpu", "cuda", "tpu")


def write(
    folder: Path, stage: TrainedStage, sampler: SamplerConfig, dtype: str, prompts: Sequence[str]
) -> None:
    """Writes the weights, and denoise.stablehlo and sample.stablehlo for batches of any size.

    Args:
      dtype: type of the weights in the file and in the programs' inputs.
      prompts: prompts to embed for the programs, if any.
    """
    exported.write_tensors(folder, stage.params, dtype)
    if prompts:
        programs.write_prompts(folder, stage.stage.config, prompts)
    weights = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))
        for name, leaf in exported.flat_names(stage.stage.abstract_params).items()
    }
    written = {
        "denoise": programs.denoise(stage.stage),
        "sample": programs.sample(stage.stage, sampler),
    }
    (batch,) = jax.export.symbolic_shape("b")
    for name, program in written.items():
        function = jax.jit(program.call)
        made = jax.export.export(function, platforms=PLATFORMS)(weights, program.batch(batch))
        (folder / f"{name}.stablehlo").write_bytes(made.serialize())
