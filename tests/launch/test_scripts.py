"""The launch scripts, against a gcloud that only takes notes; local processes; the manifests."""

import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import time

import pytest
import yaml
from conftest import ROOT

from launch import local, status

LAUNCH = ROOT / "launch"
SCRIPTS = ["create", "delete", "setup", "start", "stop", "status", "logs", "keep"]
SLICE = ["--name=pod", "--zone=z"]
TRAIN = ["--config=configs/base64.py", "--workdir=/mnt/a b"]

# Notes its words; answers `describe` and questions for a worker's state from lists; fails on
# demand; and runs what is to run on a worker here, in $HOME, if $FAKE/ssh exists.
GCLOUD = r"""#!/usr/bin/env bash
printf '%q ' "$@" >>"$FAKE/calls" && echo >>"$FAKE/calls"
next() { local line; line=$(head -n 1 "$FAKE/$1"); sed -i 1d "$FAKE/$1"; echo "${line//,/$'\n'}"; }
if [[ -n ${FAKE_FAIL:-} && "$*" == *$FAKE_FAIL* ]]; then echo "ERROR: gcloud failed" >&2; exit 1; fi
case "$*" in
  *describe*)
    state=$(next states)
    case $state in NOT_FOUND | UNAVAILABLE) echo "ERROR: $state: pod" >&2; exit 1 ;; esac
    echo "$state" ;;
  *"worker.sh state"*) [[ ! -e $FAKE/workers ]] || next workers ;;
esac
[[ -e $FAKE/ssh ]] || exit 0
for word in "$@"; do
  case $word in --command=*) (cd && bash -c "${word#--command=}") || exit ;; esac
done
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with the fake's notes and answers; the fake itself is first on PATH."""
    folder = tmp_path / "fake"
    folder.mkdir()
    gcloud = folder / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def run(script, *args):
    command = [str(LAUNCH / f"{script}.sh"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def calls(fake):
    path = fake / "calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def verbs(fake):
    """The calls by their verb; what runs on workers by worker.sh's."""
    found = []
    for words in calls(fake):
        command = next((w for w in words if w.startswith("--command=")), "")
        inner = re.search(r"worker\.sh (\w+)", command)
        found.append(f"worker {inner[1]}" if inner else " ".join(words[2:4]))
    return found


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean():
    scripts = sorted(str(p) for p in LAUNCH.glob("*.sh"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "worker"])
def test_help_shows_how(script):
    done = run(script, "--help")
    assert done.returncode == 0 and f"launch/{script}.sh" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_the_commands_and_runs_none(script, fake):
    more = {"create": ["--type=v4-8"], "keep": ["--type=v4-8"], "status": ["--workdir=w"]}
    tail = ["--", *TRAIN] if script in ("start", "keep") else []
    done = run(script, *SLICE, "--dry-run", *more.get(script, []), *tail)
    assert done.returncode == 0, done.stderr
    assert calls(fake) == []
    assert "gcloud compute tpus" in done.stdout


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("create", ["--name=pod", "--type=v4-8"], "--zone is missing"),
        ("create", [*SLICE, "--type=v9-8"], "--type is 'v9-8'; allowed: v4-N"),
        ("create", [*SLICE, "--spot=maybe"], "--spot is 'maybe'; it is a switch"),
        ("delete", [*SLICE, "--nmae=x"], "unknown flag --nmae"),
        ("delete", ["pod"], "unexpected argument 'pod'"),
        ("delete", ["--name"], "--name has no value"),
        ("start", SLICE, "nothing to start"),
        ("keep", [*SLICE, "--type=v4-8"], "nothing to start"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(script, args, words, fake):
    done = run(script, *args)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and calls(fake) == []


def test_create_asks_for_what_was_asked(fake):
    assert run("create", *SLICE, "--type=v5p-128", "--spot", "--project=p").returncode == 0
    (words,) = calls(fake)
    assert words[:5] == ["compute", "tpus", "tpu-vm", "create", "pod"]
    assert set(words[5:]) == {
        "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5", "--spot", "--zone=z",
        "--project=p",
    }  # fmt: skip


def test_create_waits_for_a_queued_slice(fake):
    (fake / "states").write_text("WAITING_FOR_RESOURCES\nUNAVAILABLE\nPROVISIONING\nACTIVE\n")
    assert run("create", *SLICE, "--type=v4-8", "--queued", "--poll=0").returncode == 0
    assert verbs(fake) == ["queued-resources create"] + 4 * ["queued-resources describe"]
    (fake / "states").write_text("FAILED\n")
    done = run("create", *SLICE, "--type=v4-8", "--queued", "--poll=0")
    assert done.returncode == 1 and "came to nothing" in done.stderr


@pytest.mark.parametrize("script", ["delete", "stop"])
def test_gclouds_failure_is_the_scripts(script, fake, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "tpu-vm")
    done = run(script, *SLICE)
    assert done.returncode == 1 and done.stderr == "ERROR: gcloud failed\n"


@pytest.fixture
def worker(fake, tmp_path):
    """A "worker": the home folder, where setup.sh unpacks, with a stand-in for Python."""
    (fake / "ssh").touch()
    python = tmp_path / "imagen_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/usr/bin/env bash\nprintf "<%s>" "$@"; echo\n'
        'trap "exit 75" TERM\nwhile [[ ! -e $HOME/end ]]; do sleep 0.05; done\nexit 3\n'
    )
    python.chmod(0o755)
    shutil.copytree(LAUNCH, tmp_path / "imagen_jax/launch")
    return tmp_path


def worker_state(worker, wanted):
    for _ in range(200):
        done = subprocess.run(
            [worker / "imagen_jax/launch/worker.sh", "state"], capture_output=True, text=True
        )
        if done.stdout.strip() == wanted:
            break
        time.sleep(0.05)
    return done.stdout.strip()


def test_a_worker_starts_stops_and_tells_its_exit_code(worker):
    assert worker_state(worker, "none") == "none"
    assert run("start", *SLICE, "--", *TRAIN).returncode == 0
    assert worker_state(worker, "running") == "running"
    again = run("start", *SLICE, "--", *TRAIN)
    assert again.returncode and "a run is on already" in again.stderr
    for _ in range(100):
        log = run("logs", *SLICE, f"--out={worker}/logs").stdout
        if "imagen_jax.train" in log:
            break
        time.sleep(0.05)
    assert "<-m><imagen_jax.train><--distributed><--config=configs/base64.py>" in log
    assert "<--workdir=/mnt/a b>" in log
    assert run("stop", *SLICE).returncode == 0
    assert worker_state(worker, "exit 75") == "exit 75"
    (worker / "end").touch()
    assert run("start", *SLICE, "--", *TRAIN).returncode == 0
    assert worker_state(worker, "exit 3") == "exit 3"


def test_setup_copies_the_checkout_and_installs(fake, worker):
    shutil.rmtree(worker / "imagen_jax")
    # scp: the archive goes to the worker's home.
    gcloud = GCLOUD + '[[ $4 != scp ]] || cp "$5" "$HOME/${6#pod:}"\n'
    (fake / "gcloud").write_text(gcloud)
    (fake / "sudo").write_text('#!/usr/bin/env bash\necho "$@" >>"$FAKE/sudo_calls"\n')
    (fake / "sudo").chmod(0o755)
    done = run("setup", *SLICE, "--image=repo/imagen", "--mount=touch mounted")
    assert done.returncode == 0, done.stderr
    assert (worker / "imagen_jax/imagen_jax/train.py").exists()
    assert (worker / "imagen_jax/launch/worker.sh").exists()
    assert (worker / "mounted").exists()
    assert (fake / "sudo_calls").read_text() == "docker pull --quiet repo/imagen\n"


def keep(*args):
    return run("keep", *SLICE, "--type=v4-16", "--poll=0", *args, "--", *TRAIN)


BEGIN = ["tpu-vm create", "tpu-vm scp", "tpu-vm ssh", "worker install", "worker start"]
LOOK = ["tpu-vm describe", "worker state"]


def test_keep_sees_a_run_through_preemption_and_failure(fake):
    (fake / "states").write_text(
        "NOT_FOUND\nREADY\nPREEMPTED\nNOT_FOUND\nUNAVAILABLE\n" + 4 * "READY\n"
    )
    (fake / "workers").write_text(
        "running,running\nexit 75,exit 75\nexit 134,exit 1\nexit 0,exit 0\n"
    )
    done = keep()
    assert done.returncode == 0, done.stdout + done.stderr
    assert verbs(fake) == [
        "tpu-vm describe", *BEGIN,
        *LOOK,
        "tpu-vm describe", "tpu-vm delete",
        "tpu-vm describe", *BEGIN,
        "tpu-vm describe",
        *LOOK, "worker start",
        *LOOK, "worker start",
        *LOOK,
    ]  # fmt: skip


def test_keep_starts_a_worker_that_the_others_missed(fake):
    (fake / "states").write_text(3 * "READY\n")
    (fake / "workers").write_text("running,none\nexit 2,none\nexit 0\n")
    assert keep().returncode == 0
    assert verbs(fake) == [*LOOK, *LOOK, *BEGIN[1:], *LOOK]


@pytest.mark.parametrize(
    ("workers", "code", "words"),
    [
        ("running,exit 2\nexit 0,exit 2\n", 2, "refused its input"),
        (3 * "exit 1,exit 134\n", 1, "failed too often (exit 1, exit 134)"),
    ],
)
def test_keep_gives_up(workers, code, words, fake):
    (fake / "states").write_text(9 * "READY\n")
    (fake / "workers").write_text(workers)
    done = keep("--max-restarts=2")
    assert done.returncode == code and words in done.stdout


def test_status_sums_up_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_steps": 1000, "log_every": 10}))
    rows = [
        {"step": 10, "loss": 0.5, "step_time": 0.5, "images_per_s": 64.0},
        {"step": 10, "eval_loss": 0.25},
        {"step": 20, "loss": 0.4, "step_time": 0.25, "images_per_s": 128.0, "mfu": 0.5},
    ]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3')
    for name in ("step_8", "step_16", "step_24.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    written = (tmp_path / "metrics.jsonl").stat().st_mtime
    seen = status.summary(tmp_path, written + 5)
    assert seen["step"] == "20 of 1,000 (2.0%), written 5s ago"
    assert seen["rate"] == "4 steps/s, 128 images/s, MFU 50.0%"
    assert seen["state"] == "running, 4m05s to go"
    assert seen["eval loss"] == "0.2500 at step 10"
    assert seen["checkpoint"].startswith(f"{tmp_path}/checkpoints/step_16, ")
    assert seen["tensorboard"] == f"tensorboard --logdir={tmp_path}"
    assert status.summary(tmp_path, written + 3600)["state"].startswith("silent for 1h00m")


def test_status_of_no_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        status.main([f"--workdir={tmp_path}"])
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: --workdir=")


def start(*scripts):
    return [subprocess.Popen(["bash", "-c", s], start_new_session=True) for s in scripts]


def test_local_stops_the_others_when_one_fails():
    running = start("sleep 0.3; exit 3", "sleep 60")
    assert local.wait(running) == 3
    assert running[1].returncode == -signal.SIGTERM


def test_local_kills_those_that_do_not_heed(monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.3)
    running = start("sleep 0.3; kill -ABRT $$", "trap '' TERM; while true; do sleep 0.05; done")
    assert local.wait(running) == 128 + signal.SIGABRT
    assert running[1].returncode == -signal.SIGKILL


def test_local_lets_all_save_when_all_stop():
    running = start(f"exit {local.STOPPED}", "trap 'exit 9' TERM; sleep 0.5; exit 75")
    assert local.wait(running) == local.STOPPED
    assert [p.returncode for p in running] == [75, 75]


def test_the_jobset_is_what_kubernetes_reads():
    names = {
        "NAME": "base64", "IMAGE": "repo/imagen:1", "ACCELERATOR": "tpu-v4-podslice",
        "TOPOLOGY": "4x8x8", "SLICES": "1", "HOSTS": "64", "CHIPS": "4", "CLAIM": "share",
        "CONFIG": "configs/base64.py",
    }  # fmt: skip
    text = (LAUNCH / "jobset.yaml").read_text()
    assert set(re.findall(r"\$(\w+)", text)) == set(names)
    spec = yaml.safe_load(string.Template(text).substitute(names))["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 64
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:4] == ["python", "-m", "imagen_jax.train", "--distributed"]
    # Otherwise training refuses the devices of several slices.
    assert "--config.mesh.slice=1" in container["command"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_the_image_takes_files_that_exist():
    ignore = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert kept and all((ROOT / name).exists() for name in kept)
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and not line.startswith("COPY . "):
            assert all(n.split("/")[0] in kept for n in line.split()[1:-1]), line
