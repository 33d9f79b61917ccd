"""Every command answers --help without a slow import, and a mistake with one line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from making import manifest, write_tars

COMMANDS = (
    *("emoji", "scenes.__main__", "scenes.measure", "ingest", "ingest_beam", "recaption"),
    *("encode_text", "encode_text_beam"),
)


def test_help_needs_no_slow_import():
    slow = {"jax", "tensorflow", "skimage", "apache_beam", "pyarrow", "py3langid"}
    lines = (
        f"import data_pipelines.{command}; print({command!r}, {slow} & set(sys.modules))"
        for command in COMMANDS
    )
    code = "import sys\n" + "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [f"{command} set()" for command in COMMANDS], done.stderr


def test_ingest_from_the_command_line(tmp_path):
    write_tars(tmp_path / "tars", 1, 4)
    flags = ["--source=tars", "--name=mine", "--encoder=", "--resolution=16", "--languages=en,de"]
    done = subprocess.run(
        [sys.executable, "-m", "data_pipelines.ingest", *flags, "--caption_columns=caption"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    settings = manifest(tmp_path / "data/mine/1.0.0")["settings"]
    assert (settings["resolution"], settings["languages"]) == (16, ["en", "de"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ingest --source=gone", "error: --source=gone does not exist"),
        ("ingest", "error: --source is needed (see --help)"),
        ("ingest --source=x --resolution=0", "resolution"),
        ("encode_text_beam --out=x --captions=y", "Apache Beam is not installed; install it with"),
        ("ingest_beam --source=x", "Apache Beam is not installed; install it with"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, command, words):
    module, *arguments = command.split()
    # Beam must not be found, even where it is installed.
    code = (
        "import sys, runpy; sys.modules['apache_beam'] = None; "
        f"sys.argv = {[module, *arguments]}; sys.path.insert(0, {str(ROOT)!r}); "
        f"runpy.run_module('data_pipelines.{module}', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
