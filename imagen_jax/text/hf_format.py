"""Reads and writes encoders in Hugging Face's layout: a folder of config.json and weight files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import nnx, traverse_util

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import read_json, replacing, write_text
from imagen_jax.formats.tensors import FileTensor, read_safetensors
from imagen_jax.formats.torch import read_torch
from imagen_jax.text.families import FAMILIES, T5_NAMES, namer
from imagen_jax.text.loading import Checkpoint
from imagen_jax.text.t5 import T5Encoder
from imagen_jax.text.tokenizer import TOKENIZER_CONFIG_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# In order of preference. Each may be one file, or an index of several shards.
WEIGHT_FILES = {WEIGHTS_FILE: read_safetensors, "pytorch_model.bin": read_torch}
# Some versions write these as tokenizer_class if the vocabulary is in a tokenizer.json.
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def open_hf(folder: str | os.PathLike) -> Checkpoint:
    """Opens the encoder in a Hugging Face folder of a family in FAMILIES; ignores other parts.

    Raises:
      UserError: a file or config field is missing or damaged, or the model type is unsupported.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG_FILE)
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{folder / CONFIG_FILE}: model_type is {kind!r}; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    files, tensors = _open_weights(folder)
    return Checkpoint(
        folder=folder,
        module=family.module,
        config=family.read_config(fields, folder / CONFIG_FILE),
        tensors={family.canonical(name): tensor for name, tensor in tensors.items()},
        stored_name=namer(family.names, _LEAVES),
        kernels_reversed=True,
        files=files,
        tokenizer=_tokenizer_class(folder, fields, family.tokenizer),
    )


def _tokenizer_class(folder: Path, fields: dict[str, Any], default: str) -> str:
    """Returns the folder's tokenizer_class from either of its two configs, else `default`."""
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        fields = {**fields, **read_json(folder / TOKENIZER_CONFIG_FILE)}
    name = fields.get("tokenizer_class") or default
    return default if name in GENERIC_TOKENIZERS else str(name).removesuffix("Fast")


def _open_weights(folder: Path) -> tuple[list[Path], dict[str, FileTensor]]:
    """Returns the weight files sorted by name, and all their tensors."""
    for name, read in WEIGHT_FILES.items():
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return [whole], read(whole)
        if index.is_file():
            files = _shards(index)
            return files, {name: tensor for file in files for name, tensor in read(file).items()}
    expected = ", ".join(f"{name}, {name}.index.json" for name in WEIGHT_FILES)
    raise UserError(f"text encoder {str(folder)!r}: no weights; expected one of {expected}")


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index names, sorted by name."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise UserError(f"{index}: 'weight_map' is not a map of tensors to files")
    files = [index.parent / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index}: shard {str(file.name)!r} is not in this folder")
    return files


def load_t5(folder: str | os.PathLike) -> T5Encoder:
    """Loads a T5 encoder in float32, without reading a decoder.

    Raises:
      UserError: as for `open_hf` and `Checkpoint.load`, or the model is not a T5.
    """
    checkpoint = open_hf(folder)
    if checkpoint.module is not T5Encoder:
        raise UserError(f"{folder}: holds a {checkpoint.module.__name__}; expected a T5Encoder")
    return checkpoint.load()


def save_t5(
    encoder: T5Encoder, folder: str | os.PathLike, *, dtype: np.dtype, extra: dict[str, Any]
) -> None:
    """Writes a folder that `load_t5` can read. Each file appears complete or not at all.

    Args:
      dtype: type of the tensors on disk.
      extra: more fields for config.json: the tokenizer, and how the weights were trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name, weights = namer(T5_NAMES, _LEAVES), nnx.to_pure_dict(nnx.state(encoder))
    tensors = {
        name(key): np.ascontiguousarray(value.T if key[-1] == "kernel" else value, dtype)
        for key, value in traverse_util.flatten_dict(weights).items()
    }
    kind = "umt5" if encoder.config.bias_in_every_block else "t5"
    config = {
        "model_type": kind,
        "architectures": [f"{kind.upper()}EncoderModel"],
        **dataclasses.asdict(encoder.config),
        **extra,
    }
    with replacing(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors, {"format": "np"}))
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
