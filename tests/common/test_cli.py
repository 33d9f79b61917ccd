"""Commands answer --help and reject bad flags without JAX; log lines do not tear progress bars."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = ("imagen_jax.train", "imagen_jax.evaluate")
HEAVY = re.compile(r"\| +(jax|tensorflow|flax|orbax)$", re.MULTILINE)


def run(module, *args):
    command = [sys.executable, "-X", "importtime", "-m", module, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    heavy = HEAVY.findall(done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.returncode, done.stdout, lines, heavy


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_explains_and_exits_with_0_without_jax(module, flag):
    code, out, lines, heavy = run(module, flag)
    assert (code, lines, heavy) == (0, [], [])
    assert "--workdir" in out and "--compilation_cache" in out


@pytest.mark.parametrize(
    ("module", "args", "words"),
    [
        ("train", ["--workdri=w"], "--workdri is not a flag; did you mean --workdir=w? (see"),
        ("evaluate", ["--guidence=2"], "--guidence is not a flag; did you mean --guidance=2? (see"),
        ("train", ["--xyz"], "--xyz is not a flag (see --help); config keys are written --config."),
        ("evaluate", ["--xyz"], "--xyz is not a flag (see --help)"),
        (
            "train",
            ["--config=configs/demo.py", "--num_steps=10"],
            "did you mean --config.num_steps=10 or --config.sampling.num_steps=10? (see --help)",
        ),
        (
            "train",
            ["--config=configs/base64.py:tiny", "--embed_dimm=64"],
            "--embed_dimm is not a flag; did you mean --config.model.embed_dim=64? (see --help)",
        ),
        (
            "train",
            ["--model.embed_dim=64", "--config=configs/demo.py:unet"],
            "--model.embed_dim is not a flag; did you mean --config.model.embed_dim=64? (see",
        ),
        ("train", ["--config=nope.py", "--num_steps=10"], "--num_steps is not a flag"),
        ("train", [], "--config=FILE is needed"),
        ("train", ["--config=nope.py"], "--config is 'nope.py'; no such config file"),
        ("train", ["--config=configs/base64.py:huge"], "'huge'; allowed: 2b"),
        ("train", ["--config=configs/demo.py", "extra"], "unexpected argument 'extra'"),
        ("train", ["--config=configs/demo.py", "--num_processes=2"], "it needs --coordinator"),
        ("evaluate", ["--workdir=/nowhere"], "--workdir=/nowhere holds no run"),
        ("evaluate", ["--config.seed=1"], "--config.seed is not a flag (see --help)"),
        ("evaluate", ["--seed=-1"], "--seed=-1"),
        ("pretrain_text", [], "--out is needed (see --help)"),
        ("pretrain_text", ["--out=/dev/null/x"], "--out=/dev/null/x cannot be written"),
        (
            "train",
            ["--config=configs/demo.py:x"],
            "demo.py:x': argument 'x'; allowed: transformer, unet",
        ),
        ("evaluate", ["--guidance=much"], "--guidance is 'much'; allowed: numbers from 0 up"),
    ],
)
def test_bad_flags_are_one_line_errors_without_jax(module, args, words):
    code, out, lines, heavy = run(f"imagen_jax.{module}", *args)
    assert (code, out, heavy, len(lines)) == (2, "", [], 1), lines
    assert lines[0].startswith("error: ") and words in lines[0]


def test_log_lines_and_warnings_do_not_tear_a_progress_bar():
    code = """
import logging, sys, warnings
from tqdm import tqdm
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

def main(argv):
    bar = tqdm(total=2, desc="bar", file=sys.stderr, ncols=20)
    cli.log.info("ours")
    logging.getLogger("theirs").warning("strange")
    logging.getLogger("theirs").info("chatter")
    warnings.warn("odd")
    raise UserError("wrong")

cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    # What a terminal shows: after a carriage return, text overwrites the line.
    shown = [line.rpartition("\r")[2] for line in done.stderr.splitlines()]
    for line in ("ours", "theirs: strange", "error: wrong"):
        assert line in shown, done.stderr
    assert any(re.fullmatch(r"py\.warnings: .*UserWarning: odd", line) for line in shown)
    assert "chatter" not in done.stderr
