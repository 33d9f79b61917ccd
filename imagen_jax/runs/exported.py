"""An exported model: the weights of one stage in a safetensors file, without training state.

Its folder has the config of the run (CONFIG), the weights (TENSORS), a model card (CARD) and
EXPORT, which says what the weights are:

    format     "safetensors", "orbax", "stablehlo" or "onnx"
    version    of this layout
    source     name of the run
    step       checkpoint step
    average    "EMA, decay 0.9999", "EMA, width 0.1" or "none"
    dtype      type of the stored weights
    parameters number of parameters
    code       version of the code that exported them
    sha256     hash of TENSORS; without it, the folder cannot be loaded in place of a run
    files      hash of every file that the export is made of

A tensor is named after its path in the network: "blocks.0.attention.q.kernel". Kernels are stored
as the network has them: [in, out], and [height, width, in, out] for convolutions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath

from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import DAMAGED, WORKDIR_FAILED, RunError, UserError, first_line
from imagen_jax.common.files import read_json, sha256, write_json
from imagen_jax.formats.tensors import FileTensor, read_safetensors
from imagen_jax.runs.workdir import CARD, CONFIG, EXPORT, PARAMS, TENSORS

VERSION = 1


def is_exported(workdir: epath.PathLike) -> bool:
    """Returns whether a folder is an exported model rather than a run."""
    return (epath.Path(workdir) / EXPORT).exists()


def flat_names(params: Any) -> dict[str, Any]:
    """Returns the leaves of the weights by name: {"blocks": {"0": {"q": x}}} -> {"blocks.0.q": x}.

    Any pytree does, such as one of shapes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def write_tensors(folder: Path, params: Any, dtype: str) -> None:
    """Writes TENSORS: the weights, rounded to `dtype`, "float32" or "bfloat16"."""
    tensors = {
        name: np.asarray(jax.device_get(leaf)).astype(np.dtype(dtype), order="C")
        for name, leaf in flat_names(params).items()
    }
    try:
        safetensors.numpy.save_file(tensors, folder / TENSORS, {"format": "np"})
    except safetensors.SafetensorError as e:  # such as a full disk
        raise RunError(WORKDIR_FAILED, f"{TENSORS} was not written: {first_line(e)}") from e
    (folder / TENSORS).chmod(0o644)  # the library lets nobody else read it


def write_orbax(folder: Path, params: Any, dtype: str) -> None:
    """Writes PARAMS, an Orbax checkpoint of the weights alone, rounded to `dtype`."""
    # NumPy arrays carry no sharding, so any number of devices can restore them.
    arrays = jax.tree.map(lambda x: np.asarray(x).astype(np.dtype(dtype)), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / PARAMS, arrays)


def write_record(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Writes EXPORT, with the hashes of the files that are in the folder; returns its content.

    Args:
      fields: format, source, step, average, dtype, parameters and code.
    """
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    own = {folder / name for name in (CARD, CONFIG, EXPORT)}
    files = {p.relative_to(folder).as_posix(): sha256([p]) for p in found if p not in own}
    hashes = {"sha256": files[TENSORS]} if TENSORS in files else {}
    record = {"version": VERSION, **fields, **hashes, "files": files}
    write_json(folder / EXPORT, record)
    return record


def read(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads EXPORT of a model that can be loaded.

    Raises:
      UserError: it cannot be read, or is of another format or version.
    """
    path = to_path(workdir) / EXPORT
    record = read_json(path)
    if record.get("version") != VERSION:
        found = record.get("version")
        raise UserError(f"{path}: version is {found!r}; this code reads {VERSION}")
    if "sha256" not in record:
        raise UserError(
            f"--workdir={os.fspath(workdir)} is exported as {record.get('format')!r}, which other "
            "programs load; export it again with --format=safetensors"
        )
    for key, kind in (("step", int), ("sha256", str), ("average", str)):
        if not isinstance(record.get(key), kind):
            raise UserError(f"{path}: {key} is {record.get(key)!r}; expected {kind.__name__}")
    return record


def check_has(workdir: epath.PathLike, step: int | None, raw: bool) -> None:
    """Raises UserError if a step or kind of weights is wanted that an exported model lacks."""
    found = read(workdir)["step"]
    name = os.fspath(workdir)
    if step not in (None, found):
        raise UserError(f"no checkpoint of step {step} in {name}; the exported model is of {found}")
    if raw:
        raise UserError(f"--weights=raw is set, but {name} is exported already; name the run")


def open_tensors(workdir: epath.PathLike) -> dict[str, FileTensor]:
    """Returns the weights of an exported model by name, on disk, after comparing their hash.

    Raises:
      UserError: EXPORT cannot be read.
      RunError: the weights are not what was exported.
    """
    folder = to_path(workdir)
    if damage := _damage(folder, TENSORS, read(folder)["sha256"]):
        raise RunError(DAMAGED, f"{folder / TENSORS} is damaged: {damage}; get the model again")
    return read_safetensors(folder / TENSORS)


def restore(workdir: epath.PathLike, abstract_params: Any) -> Any:
    """Loads the weights of an exported model; a process reads only what its devices hold.

    Args:
      abstract_params: shapes, dtypes and shardings of the weights.

    Raises:
      UserError: as for `open_tensors`, or the weights are of another network.
      RunError: as for `open_tensors`.
    """
    stored, wanted = open_tensors(workdir), flat_names(abstract_params)
    for name in sorted(wanted.keys() | stored.keys()):
        have, want = (tree[name].shape if name in tree else None for tree in (stored, wanted))
        if have != want:
            raise UserError(
                f"{to_path(workdir) / TENSORS}: {name} has shape {have}; the network of {CONFIG} "
                f"has {want}"
            )
    leaves = [put(stored[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves)


def put(tensor: FileTensor, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Copies a tensor to its devices, in the type of `like`."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return tensor.read(index).astype(like.dtype, copy=False)

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def problems(workdir: Path) -> Iterator[tuple[Path, str]]:
    """Yields each file of an exported model, and what is wrong with it: "" for nothing."""
    try:
        files = read_json(workdir / EXPORT)["files"].items()
    except (UserError, KeyError, AttributeError) as e:
        yield workdir / EXPORT, str(e) if isinstance(e, UserError) else "lists no files"
        return
    yield workdir / EXPORT, ""
    for name, digest in files:
        yield workdir / name, _damage(workdir, name, digest)


def _damage(folder: Path, name: str, digest: str) -> str:
    try:
        same = sha256([folder / name]) == digest
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    return "" if same else f"its SHA-256 is not that of {EXPORT}"
