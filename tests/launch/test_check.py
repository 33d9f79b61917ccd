"""launch.check refuses, on this machine, what would fail on rented workers."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from data_pipelines.reading import check as reading
from imagen_jax.common.errors import UserError
from imagen_jax.devices import topologies
from launch import check

TRAIN = ["--config=configs/base64.py", "--workdir=/mnt/run", "--config.data.dir=/mnt/data"]


@pytest.fixture(autouse=True)
def run_in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_chip_that_can_be_rented_has_a_runtime_version():
    assert {chip.name for chip, _ in topologies.FAMILIES.values()} == set(check.RUNTIMES)


def check_run(*args, topology="v4-8", image=""):
    return check.check_run(args, topologies.tpu_slice(topology), image)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--workdir": None}, "--config=FILE and --workdir=DIR are both needed"),
        (
            {"--workdir": "gs://b/run"},
            "--workdir is 'gs://b/run'; it must be a path that all hosts",
        ),
        ({"--workdir": "runs/x"}, "--workdir is 'runs/x', which is on each worker's own disk"),
        ({"--config": "configs/base46.py"}, "--config is 'configs/base46.py'; no such config file"),
        ({"--config": f"{ROOT}/configs/base64.py"}, "setup.sh does not copy it to the workers"),
        (
            {"--config": "configs/base64.py:v4-128"},
            "config.mesh.topology is 'v4-128' but --type is",
        ),
        (
            {"--config": "configs/base64.py:v4-500"},
            "config.mesh.topology is 'v4-500'; allowed: v4-8",
        ),
        ({"--config.mesh.slice": "2"}, "config.mesh.slice is 2; allowed: 1"),
        ({"--config.batch_size": "-1"}, "config.batch_size is -1; allowed: 1 to"),
        ({"--config.modle.embed_dim": "8"}, "config.modle is not a known key"),
        ({"--config.data.dir": None}, "config.data.dir is 'data', which is on each worker's own"),
        (
            {"--config.data.dir": "gs://b/data"},
            "config.data.dir is 'gs://b/data'; it must be a path",
        ),
        ({"--config.data.embeddings": "t5"}, "config.data.embeddings is 't5', which is on each"),
        ({"--join_timeout": "x"}, "flag --join_timeout=x"),
        ({"--heartbeat_timeout": "-1"}, "flag --heartbeat_timeout=-1"),
        ({"--profile_steps": "5:1"}, "--profile_steps is '5:1'; allowed: FIRST:LAST"),
        ({"--wrokdir": "/mnt/x"}, "Unknown command line flag 'wrokdir'"),
        ({"--process_id": "1"}, "Unknown command line flag 'process_id'"),
    ],
)
def test_bad_training_flags_are_refused_in_one_line(changes, words):
    flags = dict(word.split("=", 1) for word in TRAIN) | changes
    with pytest.raises(UserError, match=re.escape(words)) as e:
        check_run(*(f"{key}={value}" for key, value in flags.items() if value))
    assert "\n" not in str(e.value)


def test_a_config_that_git_ignores_is_refused():
    folder = ROOT / "runs/test_launch"  # ignored by .gitignore
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copy(ROOT / "configs/base64.py", folder / "mine.py")
        with pytest.raises(UserError, match=r"setup\.sh does not copy it to the workers"):
            check_run("--config=runs/test_launch/mine.py", *TRAIN[1:])
    finally:
        shutil.rmtree(folder)


def test_with_a_container_the_workdir_must_be_under_its_mount():
    check_run(*TRAIN, image="repo/imagen")
    words = "--workdir is '/mnt/../a'; allowed with --image: a path under /mnt"
    with pytest.raises(UserError, match=re.escape(words)):
        check_run(*TRAIN, "--workdir=/mnt/../a", image="repo/imagen")


@pytest.mark.parametrize("topology", ["v4-512", "v5e-16"])
def test_a_good_run_passes_and_reports_what_was_not_checked(topology):
    config = f"--config=configs/base64.py:{topology}"
    found = check_run(config, *TRAIN[1:], topology=topology)
    assert "must mount /mnt/run, /mnt/data; not checked: the dataset" in found


def test_the_config_may_name_a_v5e_by_its_other_name():
    found = check_run("--config=configs/base64.py:v5e-16", *TRAIN[1:], topology="v5litepod-16")
    assert "on v5litepod-16 (4x4, 16 chips, 4 hosts); workers must mount" in found


def test_a_dataset_on_this_machine_is_checked(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has no dataset 'folder'"):
        check_run(*TRAIN, f"--config.data.dir={tmp_path}")
    opened = []
    monkeypatch.setattr(reading, "check_dataset", opened.append)
    found = check_run(*TRAIN, f"--config.data.dir={tmp_path}")
    assert "the dataset here fits the config" in found and opened[0].data.dir == str(tmp_path)


def test_the_checked_flags_are_those_of_training():
    code = """if True:
        from absl import flags
        from imagen_jax import train
        before = set(flags.FLAGS)
        train.define_flags()
        print(*set(flags.FLAGS) - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    # Flags of a single process, which --distributed sets, and one that trains nothing.
    own = {"coordinator", "num_processes", "process_id", "replay_step"}
    absl = {"flagfile", "undefok"}
    assert set(check.parse_train_args([])) - absl == set(done.stdout.split()) - own, done.stderr
