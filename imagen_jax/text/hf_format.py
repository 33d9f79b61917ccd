"""Encoders on disk as Hugging Face lays them out: a folder of config.json and weight files."""

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
# The first that is there is read. Of each there may be one file, or an index of several.
WEIGHT_FILES = {WEIGHTS_FILE: read_safetensors, "pytorch_model.bin": read_torch}
# What some versions write as tokenizer_class where the vocabulary is in a tokenizer.json.
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def open_hf(folder: str | os.PathLike) -> Checkpoint:
    """The encoder in a folder of Hugging Face's, of a family in FAMILIES; other parts are ignored.

    Raises:
        UserError: a file or a config field is missing or damaged, or it is another kind of model.
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
    """The folder's tokenizer_class, which may stand in either of two files, or `default`."""
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        fields = {**fields, **read_json(folder / TOKENIZER_CONFIG_FILE)}
    name = fields.get("tokenizer_class") or default
    return default if name in GENERIC_TOKENIZERS else str(name).removesuffix("Fast")


def _open_weights(folder: Path) -> tuple[list[Path], dict[str, FileTensor]]:
    """The weight files in the order of their names, and all tensors in them."""
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
    """The files that an index names, by their names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise UserError(f"{index}: 'weight_map' is not a map of tensors to files")
    files = [index.parent / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index}: shard {str(file.name)!r} is not in its folder")
    return files


def load_t5(folder: str | os.PathLike) -> T5Encoder:
    """Loads a T5 encoder into float32; a decoder is left unread.

    Raises:
        UserError: as `open_hf` and `Checkpoint.load`, or another family than T5.
    """
    checkpoint = open_hf(folder)
    if checkpoint.module is not T5Encoder:
        raise UserError(f"{folder}: holds a {checkpoint.module.__name__}; expected a T5Encoder")
    return checkpoint.load()


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
