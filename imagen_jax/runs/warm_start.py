"""A warm start: weights of another run in place of random ones, as far as they fit this network.

Arrays are matched by name. Where the other run has no array of that name, or one of another shape,
the random weights stay. One case is reshaped: the first layer, if the networks differ only in the
channels of their input (a base model and a super-resolution model). The new channels start at zero,
so the network starts as the one that was trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from imagen_jax.common.buckets import to_path
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config
from imagen_jax.devices import sharding
from imagen_jax.runs import exported
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.workdir import CHECKPOINTS, CONFIG, read_config
from imagen_jax.sections import InitConfig

LOADED, RESHAPED, SKIPPED = "loaded", "reshaped", "skipped"

# Parts of the networks that read the image; the channels of a pixel are their innermost inputs.
FIRST_LAYERS = ("stem", "patches")
# Most rows of the table of arrays that were not loaded as they are.
MOST_ROWS = 40


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a run, still on disk.

    Attributes:
      config: the config of the run.
      step: their step.
      shapes: shapes of the arrays by dotted name, such as "stem.kernel".
      read: {name: ShapeDtypeStruct} -> {name: array}; reads only these.
    """

    config: Config
    step: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]


@contextlib.contextmanager
def open_weights(init: InitConfig) -> Iterator[Weights]:
    """Opens the weights that config.init names, of a run or an exported model.

    Raises:
      UserError: the workdir has no run, or no such checkpoint.
      RunError: the checkpoint is damaged.
    """
    workdir, step = init.source
    if exported.is_exported(workdir):
        exported.check_has(workdir, step, raw=False)
        if init.weights != "ema":
            allowed = f"ema, because {workdir} is an exported model"
            raise UserError(f"config.init.weights is {init.weights!r}; allowed: {allowed}")
        yield _open_exported(workdir)
        return
    config, part = read_config(workdir), "ema" if init.weights == "ema" else "params"
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        step = checkpoints.existing_step(step)
        saved = checkpoints.saved_shapes(step)[part]

        def read(targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
            return exported.flat_names(checkpoints.restore_part(step, {part: _nest(targets)})[part])

        shapes = {name: tuple(leaf.shape) for name, leaf in exported.flat_names(saved).items()}
        yield Weights(config, step, shapes, read)


def _open_exported(workdir: str) -> Weights:
    tensors = exported.open_tensors(workdir)

    def read(targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        return {name: exported.put(tensors[name], like) for name, like in targets.items()}

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(read_config(workdir), exported.read(workdir)["step"], shapes, read)


def check_source(init: InitConfig, workdir: Path) -> None:
    """Checks at once that config.init names a run, unless this run has its own checkpoints.

    Raises:
      UserError: it names none.
    """
    other, _ = init.source
    own = any((workdir / CHECKPOINTS).glob("step_*"))
    if not own and not (to_path(other) / CONFIG).exists():
        raise UserError(
            f"config.init.workdir is {init.workdir!r}, which holds no run ({CONFIG} is missing); "
            "allowed: the --workdir of a run, optionally with :STEP"
        )


def load(config: Config, params: Any) -> Any:
    """Returns `params` with the arrays of config.init's run in place of those that they fit.

    Logs which arrays were loaded, reshaped and skipped.

    Args:
      params: the initialized weights, nested dicts of global arrays.

    Raises:
      UserError: no array fits, or as `open_weights`.
    """
    here = exported.flat_names(params)
    with open_weights(config.init) as source:
        ratio = (source.config.unet.in_channels, config.unet.in_channels)
        rows = {
            name: _outcome(name, leaf.shape, source.shapes, config.init.only, ratio)
            for name, leaf in here.items()
        }
        wanted = {name: how for name, (how, _) in rows.items() if how != SKIPPED}
        if not wanted:
            raise UserError(_nothing_fits(config, source, rows))
        targets = {
            name: _target(here[name], source.shapes[name], how) for name, how in wanted.items()
        }
        found = source.read(targets)
    for name, how in wanted.items():
        if how == RESHAPED:
            found[name] = _widened(found[name], here[name], ratio)
    log.info("%s", table(config, source, rows, here))
    return _nest(here | found)


def _outcome(
    name: str,
    shape: tuple[int, ...],
    shapes: dict[str, tuple[int, ...]],
    only: str,
    ratio: tuple[int, int],
) -> tuple[str, str]:
    """Returns what happens to an array of this network, and why if it is not loaded as it is."""
    if not re.search(only, name):
        return SKIPPED, "config.init.only"
    there = shapes.get(name)
    if there is None:
        return SKIPPED, "not there"
    if there == shape:
        return LOADED, ""
    first = name.partition(".")[0] in FIRST_LAYERS and len(there) == len(shape) > 1
    grown = first and (*there[:-2], there[-2] * ratio[1] / ratio[0], there[-1]) == shape
    if grown and ratio[0] < ratio[1]:
        return RESHAPED, "the new input channels start at zero"
    return SKIPPED, "another shape"


def _target(leaf: jax.Array, shape: tuple[int, ...], how: str) -> jax.ShapeDtypeStruct:
    whole = sharding.replicated(leaf.sharding.mesh)
    return jax.ShapeDtypeStruct(
        shape, leaf.dtype, sharding=leaf.sharding if how == LOADED else whole
    )


def _widened(kernel: jax.Array, like: jax.Array, ratio: tuple[int, int]) -> jax.Array:
    """Adds input channels of zeros to a kernel [..., pixels x channels, out]."""
    there, here = ratio

    def widen(x):
        x = x.reshape(*x.shape[:-2], -1, there, x.shape[-1])
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, here - there), (0, 0)])
        return x.reshape(like.shape)

    return jax.jit(widen, out_shardings=like.sharding)(kernel)


def _nothing_fits(config: Config, source: Weights, rows: dict[str, tuple[str, str]]) -> str:
    init, names = config.init, ", ".join(list(rows)[:3])
    if init.only and not any(re.search(init.only, name) for name in rows):
        return f"config.init.only is {init.only!r}, which matches no array here, such as {names}"
    there, here = (c.model.get("name", "unet") for c in (source.config, config))
    return (
        f"config.init.workdir is {init.workdir!r}, but none of its {len(source.shapes)} arrays has "
        f"the name and shape of one here, such as {names} (config.model.name is {there!r} there "
        f"and {here!r} here); choose another run, or leave config.init out"
    )


def table(
    config: Config,
    source: Weights,
    rows: dict[str, tuple[str, str]],
    here: dict[str, jax.Array],
) -> str:
    """Returns what was loaded by part of the network, and every other array, at most MOST_ROWS."""
    count = {how: sum(h == how for h, _ in rows.values()) for how in (LOADED, RESHAPED, SKIPPED)}
    size = sum(leaf.size for leaf in here.values())
    taken = sum(here[name].size for name, (how, _) in rows.items() if how != SKIPPED)
    weights = "EMA" if config.init.weights == "ema" else "raw"
    lines = [
        f"warm start from {config.init.source[0]}, step {source.step:,}, {weights} weights: "
        f"{count[LOADED]} arrays loaded, {count[RESHAPED]} reshaped, {count[SKIPPED]} skipped; "
        f"{taken / size:.1%} of the parameters",
    ]
    ours, theirs = config.identity, source.config.identity
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key] and not key.startswith("optimizer."):
            lines.append(f"  config.{key} is {theirs[key]!r} there and {ours[key]!r} here")
    parts: dict[str, list[int]] = {}
    for name, (how, _) in rows.items():
        if how == LOADED:
            parts.setdefault(name.partition(".")[0], []).append(here[name].size)
    for part, sizes in parts.items():
        lines.append(f"  {LOADED:<8} {part}: {len(sizes)} arrays, {sum(sizes):,} parameters")
    others = [(name, *row) for name, row in rows.items() if row[0] != LOADED]
    for name, how, why in others[:MOST_ROWS]:
        there = _shape(source.shapes[name]) if name in source.shapes else "-"
        lines.append(f"  {how:<8} {name}: {there} there, {_shape(here[name].shape)} here; {why}")
    if more := others[MOST_ROWS:]:
        lines.append(f"  and {len(more)} more that were not loaded as they are")
    if unused := len(source.shapes.keys() - here.keys()):
        lines.append(f"  {unused} arrays there have no name of this network")
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if math.prod(shape) != 1 or shape else "scalar"


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{dotted name: leaf} -> nested dicts."""
    out: dict[str, Any] = {}
    for name, leaf in flat.items():
        *sections, last = name.split(".")
        node = out
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = leaf
    return out
