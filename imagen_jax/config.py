"""Turns the loose keys of a ConfigDict into typed dataclasses once, so a misspelt key fails at start."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from imagen_jax.errors import UserError

T = TypeVar("T")


def typed(cls: type[T], values: Mapping[str, Any], prefix: str = "", **extra: Any) -> T:
    """Builds the dataclass `cls` from `values`, checking every key and every type.

    Args:
      cls: a dataclass; a field whose type is itself a dataclass takes a nested mapping.
      values: the config section, e.g. `config["optimizer"]`.
      prefix: the section's name in messages, e.g. "optimizer.".
      **extra: fields that come from elsewhere and are not allowed in `values`.

    Raises:
      UserError: naming the key that is unknown, missing or of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in extra}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            allowed = ", ".join(sorted(fields))
            raise UserError(f"config.{prefix}{key} is not a known key{hint} (allowed: {allowed})")
    kwargs = dict(extra)
    for name, field in fields.items():
        if name in values:
            kwargs[name] = _coerce(hints[name], values[name], prefix + name)
        elif (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"config.{prefix}{name} is missing")
    return cls(**kwargs)


def _coerce(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config.{key} is {value!r}; it must be a section of keys")
        return typed(hint, value, key + ".")
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(typing.get_args(hint)[0], v, key) for v in value)
        raise UserError(f"config.{key} is {value!r}; it must be a tuple")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and (not isinstance(value, hint) or isinstance(value, bool) != (hint is bool)):
        raise UserError(f"config.{key} is {value!r}; it must be of type {hint.__name__}")
    return value


def require(ok: bool, key: str, value: Any, allowed: Any) -> None:
    """Raises a UserError naming `key`, the `value` found and what is allowed, unless `ok`."""
    if not ok:
        raise UserError(f"config.{key} is {value!r}; allowed: {allowed}")
