"""The functions of a stage that other programs run: one evaluation of the network, and sampling.

Both are pure functions of the weights, by name, and of named inputs with a leading batch axis.
Inputs are plain types that NumPy has, so text is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config import Config
from imagen_jax.diffusion.conditioning import pad_text
from imagen_jax.diffusion.process import PREDICTIONS, scaled_input
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.models import networks
from imagen_jax.runs import exported
from imagen_jax.stage import Stage
from imagen_jax.text import load_encoder

PROMPTS = "prompts.npz"

Arrays = Mapping[str, Any]


class Program(NamedTuple):
    """A function and its inputs.

    Attributes:
      call: (weights by name, inputs by name) -> float32 [B, H, W, 3].
      inputs: shapes, without the batch axis, and types.
    """

    call: Callable[[Arrays, Arrays], jax.Array]
    inputs: dict[str, jax.ShapeDtypeStruct]

    def batch(self, size: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the inputs for a batch of `size`, a number or a symbolic dimension."""
        return {
            name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for name, x in self.inputs.items()
        }


def denoise(stage: Stage, dtype: str = "") -> Program:
    """Returns the program of one evaluation of the network, without guidance.

    Its inputs are z, log_snr, text, text_mask and, for super-resolution, low_res in [-1, 1] with
    noise added and aug_level. It returns x_hat, the predicted image, without thresholding.

    Args:
      dtype: type of the activations (default: the config's).
    """
    config = stage.config
    unet = networks.without_scan(config.unet)
    network = networks.build(dataclasses.replace(unet, dtype=dtype or unet.dtype))
    prediction = PREDICTIONS[config.diffusion.prediction]

    def call(weights: Arrays, inputs: Arrays) -> jax.Array:
        cond = dict(inputs)
        z, log_snr_b = cond.pop("z"), cond.pop("log_snr")

        def run(z, log_snr_b, cond):
            return network.apply(_tree(stage, weights), z, log_snr_b, cond)

        output = scaled_input(run, prediction)(z, log_snr_b, cond)
        return prediction.to_x_eps(output, z, log_snr_b)[0]

    size, low = config.unet.image_size, config.unet.low_res
    inputs = {"z": _float(size, size, 3), "log_snr": _float(), **_text(config)}
    if low:
        inputs |= {"low_res": _float(low, low, 3), "aug_level": _float()}
    return Program(call, inputs)


def sample(stage: Stage, sampler: SamplerConfig) -> Program:
    """Returns the program of the whole sampler, with the settings fixed.

    Its inputs are seeds, text, text_mask and, for super-resolution, the pixels low_res. It returns
    images in [-1, 1].
    """
    config = stage.config

    def call(weights: Arrays, inputs: Arrays) -> jax.Array:
        cond = dict(inputs)
        seeds_b = cond.pop("seeds")
        cond["text"] = cond["text"].astype(jnp.bfloat16)  # the type of embeddings, in Stage too
        return stage.sample_batch(_tree(stage, weights), seeds_b, cond, sampler)

    inputs = {"seeds": jax.ShapeDtypeStruct((), jnp.uint32), **_text(config)}
    if config.unet.low_res:
        side = config.full_size // config.upscale
        inputs["low_res"] = jax.ShapeDtypeStruct((side, side, 3), jnp.uint8)
    return Program(call, inputs)


def write_prompts(folder: Path, config: Config, prompts: Sequence[str]) -> None:
    """Writes the embeddings of prompts, which the programs read, as float32.

    Raises:
      UserError: a prompt is too long, or its text encoder is missing.
    """
    embeddings = []
    for part in config.text.parts:
        encoder = load_encoder(part.encoder, part.max_tokens)
        encoder.check(prompts)
        embeddings.append(encoder.encode(prompts))
    text = pad_text(config.text.parts, *embeddings)
    arrays = {"prompts": np.array(prompts), "text": text["text"].astype(np.float32)}
    np.savez(folder / PROMPTS, **arrays, text_mask=text["text_mask"])


def _tree(stage: Stage, weights: Arrays) -> Any:
    names = exported.flat_names(stage.abstract_params)
    leaves = [weights[name].astype(like.dtype) for name, like in names.items()]
    return jax.tree.unflatten(jax.tree.structure(stage.abstract_params), leaves)


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _text(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    tokens = config.text.tokens
    mask = jax.ShapeDtypeStruct((tokens,), jnp.bool_)
    return {"text": _float(tokens, config.text.width), "text_mask": mask}
