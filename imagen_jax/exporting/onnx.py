"""One evaluation of the network in ONNX, with the weights inside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from imagen_jax.common.cli import quiet_imports
from imagen_jax.common.errors import UserError
from imagen_jax.exporting import programs
from imagen_jax.pipeline.trained import TrainedStage
from imagen_jax.runs import exported

MODEL = "denoise.onnx"
MOST_BYTES = 2**30  # of weights in the model itself; Protobuf ends at 2 GB


def check_installed() -> None:
    """Raises UserError unless the converter is installed."""
    try:
        with quiet_imports():
            import jax2onnx  # noqa: F401
            import onnx  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"--format=onnx needs {e.name}, which is not installed; see docs/export.md#onnx"
        ) from e


def write(folder: Path, stage: TrainedStage, batch_size: int, prompts: Sequence[str]) -> None:
    """Writes denoise.onnx for batches of one size; activations are float32.

    Weights above a gigabyte go to a file beside it.

    Args:
      prompts: prompts to embed for the program, if any.
    """
    import onnx
    from jax2onnx import to_onnx

    if prompts:
        programs.write_prompts(folder, stage.stage.config, prompts)
    program = programs.denoise(stage.stage, dtype="float32")
    weights = {k: np.asarray(v) for k, v in exported.flat_names(stage.params).items()}
    inputs = program.batch(batch_size)
    # The converter replaces Flax's layers by its own while it traces. It gets a traced program
    # instead, so that what runs is what was trained.
    traced = jax.make_jaxpr(lambda *xs: program.call(weights, dict(zip(inputs, xs, strict=True))))(
        *inputs.values()
    )
    run = jax.extend.core.jaxpr_as_fun(traced)
    for noisy in ("jax2onnx", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with jax.numpy_rank_promotion("allow"):
        model = to_onnx(
            lambda *xs: run(*xs)[0],
            inputs=list(inputs.values()),
            model_name="denoise",
            input_names=list(inputs),
            output_names=["x_hat"],
        )
    large = sum(x.nbytes for x in weights.values()) > MOST_BYTES
    onnx.save_model(
        model, folder / MODEL, save_as_external_data=large, location=f"{MODEL}.data" * large or None
    )
