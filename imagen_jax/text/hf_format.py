"""T5 encoders on disk: config.json and model.safetensors, with Hugging Face's names."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx, traverse_util

from imagen_jax.errors import UserError
from imagen_jax.files import replacing
from imagen_jax.text.t5 import T5Config, T5Encoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_FEED_FORWARD = "gated-gelu"  # what sets v1.1 apart from the first T5

_NAMES = {
    "embed.embedding": "shared.weight",
    "relative_bias.table.embedding": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "final_norm.scale": "encoder.final_layer_norm.weight",
}
_BLOCK_NAMES = {
    "attention_norm.scale": "layer.0.layer_norm.weight",
    "attention.query.kernel": "layer.0.SelfAttention.q.weight",
    "attention.key.kernel": "layer.0.SelfAttention.k.weight",
    "attention.value.kernel": "layer.0.SelfAttention.v.weight",
    "attention.out.kernel": "layer.0.SelfAttention.o.weight",
    "mlp_norm.scale": "layer.1.layer_norm.weight",
    "mlp.gate.kernel": "layer.1.DenseReluDense.wi_0.weight",
    "mlp.up.kernel": "layer.1.DenseReluDense.wi_1.weight",
    "mlp.down.kernel": "layer.1.DenseReluDense.wo.weight",
}


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config.json of an encoder's folder.

    Raises:
        UserError: it is missing or not JSON.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        return json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"text encoder {str(folder)!r}: cannot read {CONFIG_FILE}") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not valid JSON ({e})") from e


def load_t5(folder: str | os.PathLike) -> T5Encoder:
    """Loads a T5 v1.1 encoder, one tensor at a time, into float32; a decoder is left unread.

    Raises:
        UserError: a file, a config field or a tensor is missing, or has the wrong shape.
    """
    config = _t5_config(read_config(folder), Path(folder) / CONFIG_FILE)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
    path = Path(folder) / WEIGHTS_FILE
    try:
        with safetensors.safe_open(path, framework="np") as weights:
            flat = {key: _read(weights, path, key, spec) for key, spec in _flatten(state)}
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as safetensors ({e})") from e
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(flat))
    return nnx.merge(graphdef, state)


def save_t5(
    encoder: T5Encoder, folder: str | os.PathLike, *, dtype: np.dtype, extra: dict[str, Any]
) -> None:
    """Writes what `load_t5` reads; each file appears whole or not at all.

    Args:
        dtype: the tensors' type on disk.
        extra: further fields of config.json: the tokenizer, and how the weights came to be.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _hf_name(key): np.ascontiguousarray(_transposed(key, np.asarray(value)), dtype)
        for key, value in _flatten(nnx.state(encoder))
    }
    config = {
        "model_type": "t5",
        "architectures": ["T5EncoderModel"],
        "feed_forward_proj": _FEED_FORWARD,
        **dataclasses.asdict(encoder.config),
        **extra,
    }
    with replacing(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors, {"format": "np"}))
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def _t5_config(fields: dict[str, Any], path: Path) -> T5Config:
    found = fields.get("feed_forward_proj")
    if found != _FEED_FORWARD:
        raise UserError(
            f"{path}: feed_forward_proj is {found!r}; only {_FEED_FORWARD!r} (T5 v1.1) is supported"
        )
    known = {f.name: f for f in dataclasses.fields(T5Config)}
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise UserError(f"{path}: field {name!r} is missing")
    return T5Config(**{name: fields[name] for name in known if name in fields})


def _flatten(state: nnx.State) -> Iterator[tuple[tuple, jax.Array]]:
    yield from traverse_util.flatten_dict(nnx.to_pure_dict(state)).items()


def _hf_name(key: tuple) -> str:
    if key[0] == "blocks":
        return f"encoder.block.{key[1]}.{_BLOCK_NAMES['.'.join(key[2:])]}"
    return _NAMES[".".join(key)]


def _transposed(key: tuple, array: np.ndarray) -> np.ndarray:
    """Projections are [in, out] here and [out, in] on disk; other tensors are the same."""
    return array.T if key[-1] == "kernel" else array


def _read(weights, path: Path, key: tuple, spec: jax.ShapeDtypeStruct) -> jax.Array:
    name = _hf_name(key)
    if name not in weights.keys():  # noqa: SIM118 (not a dict, nor iterable)
        raise UserError(f"{path}: tensor {name!r} is missing; expected shape {spec.shape}")
    found = tuple(weights.get_slice(name).get_shape())
    expected = spec.shape[::-1] if key[-1] == "kernel" else spec.shape
    if found != expected:
        raise UserError(f"{path}: tensor {name!r} has shape {found}; config.json says {expected}")
    return jnp.asarray(_transposed(key, weights.get_tensor(name)), jnp.float32)
