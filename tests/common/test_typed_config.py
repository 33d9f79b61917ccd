"""Config sections become typed fields; a value that does not fit is an error naming the key."""

import dataclasses
import json

import pytest
from conftest import ROOT

from imagen_jax.common.errors import UserError
from imagen_jax.common.typed_config import keys, load, require, run_name, typed
from imagen_jax.config import parse


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float
    mults: tuple[int, ...] = (1, 2)
    name: str | None = None
    flag: bool = False
    inner: Inner = Inner()


def test_fields_get_the_given_values_or_their_defaults():
    got = typed(Outer, {"rate": 1, "mults": [4, 5], "inner": {"size": 7}})
    assert got == Outer(1.0, (4, 5), None, False, Inner(7))
    assert isinstance(got.rate, float)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 1.0, "nmae": "x"}, ["config.o.nmae", "did you mean o.name"]),
        ({}, ["config.o.rate is missing"]),
        ({"rate": "fast"}, ["config.o.rate is 'fast'", "float"]),
        ({"rate": 1.0, "flag": 1}, ["config.o.flag is 1", "bool"]),
        ({"rate": 1.0, "inner": {"size": True}}, ["config.o.inner.size is True", "int"]),
        ({"rate": 1.0, "inner": 3}, ["config.o.inner is 3", "section"]),
        ({"rate": 1.0, "mults": 3}, ["config.o.mults is 3", "tuple"]),
        ({"rate": 1.0, "mults": ["a"]}, ["config.o.mults is 'a'", "int"]),
    ],
)
def test_values_that_do_not_fit_are_one_line_errors(values, words):
    with pytest.raises(UserError) as e:
        typed(Outer, values, "o.")
    assert "\n" not in str(e.value)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_require_names_key_value_and_allowed():
    require(True, "k", 1, "anything")
    with pytest.raises(UserError, match=r"config\.k is 1; allowed: 2"):
        require(False, "k", 1, 2)


@pytest.mark.parametrize(
    ("argument", "width", "topology"),
    [(":v4-512", 512, "v4-512"), (":1b,v5litepod-16", 384, "v5litepod-16"), (":300m", 192, None)],
)
def test_the_argument_names_a_size_a_topology_or_both(argument, width, topology):
    values = load(str(ROOT / "configs/base64.py") + argument)
    assert values["model"]["embed_dim"] == width
    assert values["mesh"].get("topology") == topology
    parse(values)


def test_an_override_of_the_topology_wins():
    values = load(str(ROOT / "configs/base64.py:v4-8"), ["mesh.topology=v4-64"])
    assert values["mesh"]["topology"] == "v4-64"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("configs/base64.py", "base64"),
        ("configs/base64.py:tiny", "base64_tiny"),
        ("configs/base64.py:1b,v4-128", "base64_1b_v4-128"),
        ("/a/b/base64.py:1b,v4-128", "base64_1b_v4-128"),
        ("/a b/my config.py:x/../y,", "my_config_x_.._y"),
        ("runs/demo/config.json", "demo"),
    ],
)
def test_a_run_is_named_after_its_config(spec, name):
    assert run_name(spec) == name


def test_nested_keys_are_dotted():
    assert keys({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == ["a", "b.c", "b.d.e"]


def test_the_config_json_of_a_run_is_a_config_file(tmp_path):
    config = parse(load(str(ROOT / "configs/base64.py:tiny")))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert parse(load(str(path))).identity == config.identity
    changed = parse(load(f"{path}:v4-8", ["seed=7"]))
    assert (changed.seed, changed.mesh.topology) == (7, "v4-8")
    with pytest.raises(UserError, match=r"argument 'tiny'; allowed: none"):
        load(f"{path}:tiny")
    for text in ("", "[1]", '{"a": ', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json: (not valid JSON|holds a list)"):
            load(str(path))
