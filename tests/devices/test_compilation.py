"""The compilation cache keeps results bit for bit, and its failures never stop a run."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, random_batch
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from imagen_jax.config import parse
from imagen_jax.devices import compilation
from imagen_jax.training.experiment import build


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    """Restores JAX's settings and the cache that all tests share."""
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {key: getattr(jax.config, key) for key in keys}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax_cache.reset_cache()
    # Show each warning once, as a program does; in tests, warnings are errors.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield
    for key, value in before.items():
        jax.config.update(key, value)
    jax_cache.reset_cache()


@pytest.fixture
def warned(monkeypatch):
    """The lines logged as warnings."""
    lines = []
    monkeypatch.setattr(compilation.log, "warning", lambda text, *args: lines.append(text % args))
    return lines


def compile_small():
    """Compiles a new function each time, so that JAX's in-memory cache misses."""
    return compilation.compile_ahead(
        jax.jit(lambda x: jnp.tanh(x @ x)).lower(np.ones((4, 4), "f4"))
    )


def entries(folder):
    return {p: p.read_bytes() for p in folder.rglob("jit_*")}


def test_a_step_from_the_cache_is_the_same_bit_for_bit(tiny_config, tmp_path):
    tiny_config.model.update(image_size=16, channel_mult=(1,))
    config = parse(tiny_config)
    states = []
    for words in ("compiled in ", f"compiled program found in {tmp_path}"):
        compilation.use_cache(str(tmp_path))
        experiment = build(config, jax.devices()[:1])
        lowered = experiment.step.lower(experiment.abstract_state, experiment.stage.abstract_batch)
        assert compilation.compile_ahead(lowered).startswith(words)
        state, metrics = experiment.step(
            experiment.init(), experiment.stage.put(random_batch(tiny_config))
        )
        states.append(jax.tree.leaves((state, metrics)))
    for fresh, cached in zip(*states, strict=True):
        assert np.asarray(fresh).tobytes() == np.asarray(cached).tobytes()


@pytest.mark.parametrize(
    ("flag", "variable", "folder"),
    [
        (None, None, "{home}/.cache/imagen_jax/xla/cores_"),
        (None, "{home}/env", "{home}/env/cores_"),
        (None, "", None),
        ("~/flag", "{home}/env", "{home}/flag/cores_"),
        ("", "{home}/env", None),
        ("gs://bucket/xla", None, "gs://bucket/xla/cores_"),
    ],
)
def test_the_flag_wins_over_the_environment(flag, variable, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if variable is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable.format(home=tmp_path))
    compilation.use_cache(flag)
    found = jax.config.jax_compilation_cache_dir
    if folder is None:
        assert found is None
        assert compile_small().startswith("compiled in")
    else:
        assert found.startswith(folder.format(home=tmp_path))


def test_a_program_for_another_number_of_cores_is_not_used(tmp_path, monkeypatch):
    for cores in (1, 2):
        monkeypatch.setattr(compilation, "_cores", lambda cores=cores: cores)
        compilation.use_cache(str(tmp_path))
        jax_cache.reset_cache()
        assert compile_small().startswith("compiled in")
    assert {p.parent.name for p in entries(tmp_path)} == {"cores_1", "cores_2"}


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_a_damaged_entry_is_logged_and_replaced(damage, tmp_path, warned):
    compilation.use_cache(str(tmp_path))
    compile_small()
    before = entries(tmp_path)
    assert before
    for path, content in before.items():
        path.write_bytes(damage(content))
    assert compile_small().startswith("compiled in")
    assert any("jit__lambda in" in line and "recompiling it" in line for line in warned)
    warned.clear()
    assert compile_small().startswith("compiled program found")
    assert not warned


@pytest.mark.parametrize("folder", ["/proc/no", __file__], ids=["unwritable", "file"])
def test_an_unwritable_folder_logs_one_line(folder, warned):
    compilation.use_cache(folder)
    assert compile_small().startswith("compiled in")
    (line,) = warned
    assert line.startswith(f"no compilation cache: {folder}/cores_") and "\n" not in line


def test_a_deleted_folder_does_no_harm(tmp_path):
    warnings.simplefilter("ignore")
    compilation.use_cache(str(tmp_path / "gone"))
    compile_small()
    for path in entries(tmp_path):
        path.unlink()
    os.rmdir(jax.config.jax_compilation_cache_dir)
    assert compile_small().startswith("compiled in")


CHILD = """
import sys, jax, jax.numpy as jnp
from imagen_jax.devices import compilation
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
compilation.use_cache(sys.argv[1])
for n in range(1, 30):
    print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((n, n))).sum()))
"""


def test_processes_share_a_folder(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [p.returncode for p in running] == [0, 0], results
    assert results[0][0] == results[1][0] and entries(tmp_path)
