"""Compiled results are cached; a program too large for a chip is a result, not a crash."""

import dataclasses
import types

import jax
import pytest
from planning_helpers import GIB

from imagen_jax.planning import compiling


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (245.88G) exceeds available HBM (30.75G).",
            245.88 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 33.62G of 30.75G hbm. Exceeded hbm capacity by 2.87G.",
            33.62 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: no threads left", None),
        ("INTERNAL: Used 1G of 2G hbm", None),
    ],
)
def test_the_needed_memory_comes_from_the_compilers_error(message, needed):
    assert compiling.too_large(message) == (needed and pytest.approx(needed))


class FakeLowered:
    """A lowered program that counts how often it is compiled."""

    def __init__(self, text="HloModule a", error=""):
        self.text, self.error, self.compiled = text, error, 0

    def as_text(self):
        return self.text

    def compile(self, compiler_options):
        self.compiled += 1
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        sizes = ("argument", "output", "alias", "temp", "generated_code")
        stats = types.SimpleNamespace(**{f"{s}_size_in_bytes": 10 + n for n, s in enumerate(sizes)})
        return types.SimpleNamespace(
            memory_analysis=lambda: stats,
            cost_analysis=lambda: {"flops": 3.0, "bytes accessed": 4.0},
            as_text=lambda: "HloModule",
        )


def test_a_program_compiles_once(tmp_path):
    lowered = FakeLowered()
    first = compiling.compile_step(lowered, "v4-8", {}, tmp_path / "cache")
    again = compiling.compile_step(lowered, "v4-8", {}, tmp_path / "cache")
    assert lowered.compiled == 1
    assert (first.cached, again.cached) == (False, True)
    assert again == dataclasses.replace(first, cached=True)
    assert first.needed == 10 + 11 - 12 + 13 + 14
    for target, options, text in (("v4-16", {}, "a"), ("v4-8", {"x": 1}, "a"), ("v4-8", {}, "b")):
        other = FakeLowered(text)
        assert not compiling.compile_step(other, target, options, tmp_path / "cache").cached


def test_a_program_that_is_too_large_is_cached_too(tmp_path):
    lowered = FakeLowered(error="RESOURCE_EXHAUSTED: Used 33.5G of 30.75G hbm.")
    for cached in (False, True):
        found = compiling.compile_step(lowered, "v4-8", {}, tmp_path)
        assert (found.cached, found.needed, found.text) == (cached, 33.5 * GIB, "")
    assert lowered.compiled == 1


def test_other_compiler_errors_propagate(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compiling.compile_step(FakeLowered(error="INTERNAL: no"), "v4-8", {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
