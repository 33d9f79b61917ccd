"""The command: flags, default folder, price, the written report, one-line errors."""

import json
import subprocess
import sys

import pytest
from absl import flags
from conftest import ROOT, load_config, shrink

from imagen_jax import plan
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.planning import host_input

DEMO = ["--config=configs/demo.py", "--out={out}"]


@pytest.fixture
def run_main():
    """Runs main with flags, and removes the flags afterwards."""
    before = set(flags.FLAGS)
    plan.define_flags()

    def run(args):
        flags.FLAGS(["plan", *args])
        plan.main([])

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config=FILE is needed"),
        (DEMO, "--topology is missing"),
        ([*DEMO, "--topology=v4-7"], "'v4-7'; allowed: v4-8"),
        ([*DEMO, "--topology=gpu", "--search"], "--search needs a TPU topology, .* is gpu"),
        ([*DEMO, "--price_per_chip_hour=-1"], "price_per_chip_hour is -1.0; allowed: dollars, 0"),
        ([*DEMO, "--price_per_chip_hour=nan"], "price_per_chip_hour is nan; allowed"),
    ],
)
def test_bad_input_is_a_one_line_error(args, message, tmp_path, run_main):
    with pytest.raises(UserError, match=message) as e:
        run_main([a.format(out=tmp_path / "out") for a in args])
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "topology", "folder"),
    [
        ("configs/base64.py:v4-512", "v4-512", "plans/base64_v4-512"),
        ("configs/base64.py:v4-128,1b", "v4-128", "plans/base64_v4-128_1b"),
        ("configs/base64.py:1b", "v5litepod-16", "plans/base64_1b_v5litepod-16"),
    ],
)
def test_the_default_folder_is_named_after_config_and_topology(spec, topology, folder):
    assert plan.default_folder(spec, topology) == folder


def test_a_plan_with_a_price_in_the_default_folder(tmp_path, run_main, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["width=32", "depth=1"]
    run_main(
        [
            f"--config={ROOT}/configs/demo.py",
            "--topology=gpu",
            "--price_per_chip_hour=2.5",
            f"--cache={tmp_path}/cache",
            *(f"--set=model.{item}" for item in small),
        ]
    )
    out = tmp_path / "plans" / "demo_gpu"
    pace = json.loads((out / "plan.json").read_text())["pace"]
    assert pace["dollars"] == pytest.approx(2.5 * pace["chip_hours"])
    assert pace["dollars_per_1000_steps"] == pytest.approx(pace["dollars"] / 2.2)
    page, text = (out / "plan.html").read_text(), capsys.readouterr().out
    for words in ("cost at $2.5 per chip-hour", "cost per 1,000 steps"):
        assert words in page and words in text
    assert "not measured: config.data.dir is" in text


def test_the_plan_times_the_input_pipeline_if_the_data_exist(tiny_data, monkeypatch):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    monkeypatch.setattr(host_input.describe_rate, "__defaults__", (0.1,))
    assert "images/s" in plan.measured_input(parse(values))
    values["data"]["dir"] = "nowhere"
    assert "'nowhere', which does not exist" in plan.measured_input(parse(values))


def test_help_loads_no_heavy_library():
    code = "import sys; from imagen_jax import plan; plan.define_flags(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "imagen_jax.plan" in loaded, done.stderr
    assert not loaded & {"jax", "numpy", "tensorflow", "matplotlib", "PIL"}
