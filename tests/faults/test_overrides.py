"""Whatever --config.KEY=VALUE says is one line, or a config whose numbers make sense."""

import math

import pytest
from conftest import ROOT

from imagen_jax.common import typed_config
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse

HOSTILE = [
    *("{[]:1}", "{1:2}", "{}", "[]", "()", "(1,)", "[[]]", "{'a':{'b':1}}", "None", "true", "nan"),
    *("1e400", "-1e400", "-1", "0", str(10**21), str(10**400), "1j", "b'x'", "''", "...", "1.5"),
    *("-0.1", "1e-400", "'\\x00'", "(" * 300, "[" * 99 + "]" * 99, "9" * 5000, "-(" * 50),
]


def outcome(*overrides):
    """Returns the config, or the line that refuses it."""
    try:
        return parse(typed_config.load(f"{ROOT}/configs/demo.py:unet", overrides))
    except UserError as e:
        assert "\n" not in str(e), str(e)
        return str(e)


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def config_keys():
    import dataclasses

    values = dataclasses.asdict(outcome())
    return [*typed_config.keys(values), "model.name", *(k for k in values if "." not in k)]


def test_no_value_of_any_key_gives_a_trace_or_a_number_that_is_not_finite():
    import dataclasses

    loaded = typed_config.load(f"{ROOT}/configs/demo.py:unet")
    for key in config_keys():
        for text in HOSTILE:
            values = _set(loaded, key, typed_config._literal(text))
            try:
                config = parse(values)
            except UserError as e:
                assert "\n" not in str(e), (key, text)
            else:
                found = numbers(dataclasses.asdict(config))
                assert all(math.isfinite(n) and abs(n) < 2**32 for n in found), (key, text)


def _set(values, key, value):
    """Returns a copy of nested dicts with one dotted key replaced."""
    first, _, rest = key.partition(".")
    inner = values.get(first)
    if rest:
        value = _set(inner if isinstance(inner, dict) else {}, rest, value)
    return {**values, first: value}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed={[]:1}", "config.seed is '{[]:1}'; it must be of type int"),
        ("seed=-1", "config.seed is -1; allowed: 0 or more"),
        (f"seed={10**21}", "config.seed is too large; whole numbers go up to 4294967295"),
        ("sampling={1:2}", "config.sampling has the key 1; keys are names"),
        ("model.name.x=1", "config.model.name is {'x': 1}; allowed: unet"),
        ("model.name=[]", "config.model.name is []; allowed: unet"),
        ("optimizer.learning_rate=1e400", "config.optimizer.learning_rate is inf; it must be a f"),
        ("optimizer.learning_rate=-1", "config.optimizer.learning_rate is -1.0; allowed: 0 to"),
        (f"optimizer.learning_rate={10**21}", "config.optimizer.learning_rate is too large"),
        ("optimizer.learning_rate=1e21", "config.optimizer.learning_rate is 1e+21; allowed: 0 to"),
        ("optimizer.b1=-1", "config.optimizer.b1 is -1.0; allowed: 0 or more, below 1"),
        ("optimizer.b2=1", "config.optimizer.b2 is 1.0; allowed: 0 or more, below 1"),
        ("optimizer.eps=0", "config.optimizer.eps is 0.0; allowed: above 0, up to 1"),
        ("num_steps=4000000000", "config.num_steps is 4000000000; allowed: 1 to 2147483647"),
        ("guard.max_skips=-1", "config.guard.max_skips is -1; allowed: 0 or more"),
        ("guard.max_rollbacks=-1", "config.guard.max_rollbacks is -1; allowed: 0 or more"),
    ],
)
def test_the_line_names_key_value_and_what_is_allowed(override, words):
    assert words in outcome(override)
