"""Loads config files, applies overrides, and converts the result to typed dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import read_json

T = TypeVar("T")
# The largest whole number of a config: a seed has 32 bits.
LARGEST = 2**32 - 1
# TPU slices as Google Cloud names them, such as "v4-512"; devices/topologies.py checks that
# they exist.
TOPOLOGY = re.compile(r"v\d\w*-\d+|cpu|gpu")


def load(file: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the values of a config file, with overrides, as nested dicts.

    Args:
      file: the path of a Python file, which is run and whose `get_config` is called, or of the
        config.json of a run, which may be in a bucket. Then, after a colon, an argument of
        get_config, a TPU slice for mesh.topology, or both: "configs/base64.py:tiny",
        "configs/base64.py:1b,v4-128".
      overrides: strings such as "model.embed_dim=64"; a value that is not a Python literal is a
        string.

    Raises:
      UserError: the file does not exist, it does not take the argument, or an override is not
        key=value.
    """
    path, words = _split(file)
    topology = [w for w in words.split(",") if TOPOLOGY.fullmatch(w)]
    argument = ",".join(w for w in words.split(",") if w not in topology)
    if not path.endswith((".py", ".json")) or not _is_file(path):
        raise UserError(
            f"--config is {file!r}; no such config file (for example configs/demo.py, or the "
            "config.json of a run)"
        )
    of_python = path.endswith(".py")
    values = _python_values(file, path, argument) if of_python else read_json(buckets.to_path(path))
    if argument and path.endswith(".json"):
        raise UserError(f"--config is {file!r}: argument {argument!r}; allowed: none")
    for override in (*(f"mesh.topology={t}" for t in topology), *overrides):
        key, equals, text = override.partition("=")
        if not equals:
            shown = _shown(key)
            raise UserError(f"--config.{shown} has no value; write --config.{shown}=VALUE")
        *sections, last = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"config.{_shown(section)} has no key {last!r:.200}")
        node[last] = _literal(text)
    return values


def _split(file: str) -> tuple[str, str]:
    """Splits "configs/base64.py:tiny" or "gs://BUCKET/config.json" at the colon after the path."""
    scheme, separator, rest = file.rpartition("://")
    path, _, words = rest.partition(":")
    return f"{scheme}{separator}{path}", words


def _is_file(path: str) -> bool:
    if not buckets.is_remote(path):
        return Path(path).is_file()
    try:
        with buckets.as_os_errors(path):  # Python files must be local: they are run
            return path.endswith(".json") and buckets.to_path(path).exists()
    except OSError as e:
        raise UserError(f"--config={path} cannot be read: {e.strerror}") from e


def _python_values(file: str, path: str, argument: str) -> dict[str, Any]:
    """Runs a config file and calls its get_config."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if argument and not inspect.signature(module.get_config).parameters:
        raise UserError(f"--config is {file!r}: argument {argument!r}; allowed: none")
    try:
        return (module.get_config(argument) if argument else module.get_config()).to_dict()
    except ValueError as e:
        raise UserError(f"--config is {file!r}: {e}") from e


def run_name(spec: str) -> str:
    """Returns the name of a run of a config, safe as a folder name.

    "configs/base64.py:1b,v4-128" gives "base64_1b_v4-128". Every character other than an ASCII
    letter, a digit, ".", "_" or "-" becomes "_". "runs/demo/config.json" gives "demo".

    Args:
      spec: the argument `file` of `load`.
    """
    path, words = _split(spec)
    of_run = Path(path).name == "config.json"
    stem = Path(path).absolute().parent.name if of_run else Path(path).stem
    name = "_".join([stem, *(word for word in words.split(",") if word)])
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)


def keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys of nested dicts, such as "model.embed_dim"."""
    out = []
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        out += keys(value, f"{prefix}{key}.") if nested else [prefix + key]
    return out


def _shown(key: str) -> str:
    """Returns a key for a message of one line."""
    return key[:200] if key.isprintable() else repr(key)[:200]


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def typed(cls: type[T], values: Mapping[str, Any], prefix: str = "", **extra: Any) -> T:
    """Builds the dataclass `cls` from `values`; checks every key and every type.

    Args:
      cls: a dataclass; a field whose type is itself a dataclass takes a nested mapping.
      values: the config section, such as `config["optimizer"]`.
      prefix: the section's name in messages, such as "optimizer.".
      **extra: fields set by the caller; not allowed in `values`.

    Raises:
      UserError: a key is unknown, missing or of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in extra}
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"config.{prefix[:-1]} has the key {key!r}; keys are names")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            allowed = ", ".join(sorted(fields))
            shown = _shown(prefix + key)
            raise UserError(f"config.{shown} is not a known key{hint} (allowed: {allowed})")
    kwargs = dict(extra)
    for name, field in fields.items():
        if name in values:
            kwargs[name] = _coerce(hints[name], values[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"config.{prefix}{name} is missing")
    return cls(**kwargs)


def _coerce(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config.{key} is {value!r}; it must be a section of keys")
        return typed(hint, value, key + ".")
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = [a for a in typing.get_args(hint) if a is not type(None)]
        if value is None and len(choices) < len(typing.get_args(hint)):
            return None
        several = isinstance(value, (list, tuple))
        fitting = [a for a in choices if (typing.get_origin(a) is tuple) == several]
        hint = [*fitting, *choices][0]
        origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(typing.get_args(hint)[0], v, key) for v in value)
        raise UserError(f"config.{key} is {value!r}; it must be a tuple")
    if hint in (int, float) and isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"config.{key} is too large; whole numbers go up to {LARGEST}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{key} is {value!r}; it must be a finite number")
    # In Python a bool is an int; in a config it is not.
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise UserError(f"config.{key} is {value!r}; it must be of type {hint.__name__}")
    return value


def require(ok: bool, key: str, value: Any, allowed: Any) -> None:
    """Unless `ok`, raises a UserError that names the key, the value found and what is allowed."""
    if not ok:
        raise UserError(f"config.{key} is {value!r}; allowed: {allowed}")
