"""The launch scripts, run against a fake gcloud, and the manifests."""

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = ["create", "delete", "setup", "start", "stop", "status", "logs", "keep"]
SLICE = ["--name=pod", "--zone=us-central2-b"]
TRAIN = ["--config=configs/base64.py", "--workdir=/mnt/a b", "--config.data.dir=/mnt/data"]

# A fake gcloud. It records its arguments in $FAKE/calls, takes the answers to `describe` and to
# `worker.sh state` from the lists $FAKE/states and $FAKE/workers, and fails if its arguments
# contain $FAKE_FAIL. If $FAKE/ssh exists, it runs the commands for workers here, in $HOME.
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

# The scripts' Python. It hides the training flags from launch.check, because parsing a config takes
# seconds; the tests of launch.check cover them.
PYTHON = f"""#!/usr/bin/env bash
words=()
for word in "$@"; do
  if [[ $word == -- ]]; then break; fi
  words+=("$word")
done
exec {shlex.quote(sys.executable)} "${{words[@]}}"
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of the fake gcloud, which comes first on PATH, with its records and answers."""
    folder = tmp_path / "fake"
    folder.mkdir()
    gcloud = folder / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("PYTHON", str(folder / "python"))
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
    """Returns the calls of gcloud, each as its verb, or as "worker" and the verb of worker.sh."""
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
def test_help_shows_the_usage(script):
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


def test_a_dry_run_ends_when_a_step_fails(fake):
    (fake / "mktemp").write_text("#!/bin/sh\nexit 1\n")  # setup.sh calls it
    (fake / "mktemp").chmod(0o755)
    done = run("keep", *SLICE, "--type=v4-8", "--dry-run", "--", *TRAIN)
    assert done.returncode == 1 and done.stdout.count("gcloud") == 1


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("create", ["--name=pod", "--type=v4-8"], "--zone is missing"),
        ("create", ["--name=pod", "--type=v4-8", "--zone=z"], "--zone is 'z'; allowed: a zone"),
        (
            "create",
            ["--zone=a-b1-c", "--type=v4-8", "--name=My_pod"],
            "--name is 'My_pod'; allowed",
        ),
        ("create", [*SLICE, "--type=v9-8"], "--type is 'v9-8'; allowed: v4-N"),
        ("create", [*SLICE, "--type=v4-500"], "--type is 'v4-500'; allowed: v4-8, "),
        ("create", [*SLICE, "--type=v6e-512"], "--type is 'v6e-512'; allowed: v6e-1, "),
        ("create", [*SLICE, "--type=cpu"], "--type is 'cpu'; allowed: v4-N"),
        ("create", [*SLICE, "--type=v4-8", "--poll=x"], "--poll is 'x'; allowed: a whole number"),
        ("create", [*SLICE, "--type=v4-8", "--poll=-1"], "--poll is '-1'; allowed"),
        ("create", [*SLICE, "--type=v4-8", "--poll=08"], "--poll is '08'; allowed"),
        ("create", [*SLICE, "--spot=maybe"], "--spot is 'maybe'; allowed: true, false"),
        ("delete", [*SLICE, "--nmae=x"], "unknown flag --nmae"),
        ("delete", ["pod"], "unexpected argument 'pod'"),
        ("delete", ["--name"], "--name has no value"),
        ("start", SLICE, "nothing to start"),
        ("keep", [*SLICE, "--type=v4-8"], "nothing to start"),
        ("keep", [*SLICE, "--type=v4-500", "--", *TRAIN], "--type is 'v4-500'; allowed: v4-8, "),
        ("keep", [*SLICE, "--type=v4-8", "--poll=x", "--", *TRAIN], "--poll is 'x'"),
        (
            "keep",
            [*SLICE, "--type=v4-8", "--max-restarts=x", "--", *TRAIN],
            "--max-restarts is 'x'",
        ),
        ("keep", [*SLICE, "--type=v4-8", "--max-restarts=-1", "--", *TRAIN], "--max-restarts is"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["", "dry"])
def test_bad_input_is_a_one_line_error_and_exit_2(script, args, words, dry_run, fake):
    done = run(script, *dry_run, *args)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and calls(fake) == []


def test_create_passes_its_flags_to_gcloud(fake):
    assert run("create", *SLICE, "--type=v5p-128", "--spot", "--project=p").returncode == 0
    (words,) = calls(fake)
    assert words[:5] == ["compute", "tpus", "tpu-vm", "create", "pod"]
    assert set(words[5:]) == {
        "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5", "--spot", "--zone=us-central2-b",
        "--project=p",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["v5e-16", "v5litepod-16"])
def test_gcloud_gets_googles_name_of_a_v5e_slice(name, fake):
    assert run("create", *SLICE, f"--type={name}").returncode == 0
    (words,) = calls(fake)
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"} <= set(words)


@pytest.mark.parametrize("script", ["create", "start", "keep"])
def test_a_bad_run_is_refused_before_gcloud_is_called(script, fake, monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    slice_flags = SLICE if script == "start" else [*SLICE, "--type=v4-8"]
    done = run(
        script, *slice_flags, "--", "--config=configs/base64.py", "--workdir=gs://bucket/run"
    )
    assert (done.returncode, calls(fake)) == (2, [])
    assert done.stderr == (
        "error: --workdir is 'gs://bucket/run'; it must be a path that all hosts share, such as a "
        "mounted bucket (docs/launch.md)\n"
    )


def test_without_the_packages_the_scripts_say_how_to_install_them(fake, tmp_path):
    (fake / "python").write_text("#!/bin/sh\nexit 1\n")
    # A copy, because the checkout may have a virtual environment, which the scripts would find.
    copy = shutil.copytree(LAUNCH, tmp_path / "checkout/launch")
    command = [copy / "create.sh", *SLICE, "--type=v4-8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, calls(fake)) == (2, [])
    assert "run `make setup` here, or set PYTHON" in done.stderr and done.stderr.count("\n") == 1


def test_create_waits_for_a_queued_slice(fake):
    (fake / "states").write_text("WAITING_FOR_RESOURCES\nUNAVAILABLE\nPROVISIONING\nACTIVE\n")
    assert run("create", *SLICE, "--type=v4-8", "--queued", "--poll=0").returncode == 0
    assert verbs(fake) == ["queued-resources create"] + 4 * ["queued-resources describe"]
    (fake / "states").write_text("FAILED\n")
    done = run("create", *SLICE, "--type=v4-8", "--queued", "--poll=0")
    assert done.returncode == 1 and "the queued resource pod failed (DEAD)" in done.stderr


@pytest.mark.parametrize("script", ["delete", "stop"])
def test_a_failure_of_gcloud_is_passed_on(script, fake, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "tpu-vm")
    done = run(script, *SLICE)
    assert done.returncode == 1 and done.stderr == "ERROR: gcloud failed\n"


@pytest.fixture
def worker(fake, tmp_path):
    """A worker: the home folder, where setup.sh unpacks the code, with a fake Python."""
    (fake / "ssh").touch()
    python = tmp_path / "imagen_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/usr/bin/env bash\nprintf "<%s>" "$@"; echo\n'
        'trap "exit 75" TERM\nwhile [[ ! -e $HOME/end ]]; do sleep 0.05; done\nexit 3\n'
    )
    python.chmod(0o755)
    shutil.copytree(LAUNCH, tmp_path / "imagen_jax/launch")
    yield tmp_path
    (tmp_path / "end").touch()  # ends the fake training of a failed test


def worker_state(worker, wanted):
    for _ in range(200):
        done = subprocess.run(
            [worker / "imagen_jax/launch/worker.sh", "state"], capture_output=True, text=True
        )
        if done.stdout.strip() == wanted:
            break
        time.sleep(0.05)
    return done.stdout.strip()


def test_a_worker_starts_stops_and_reports_its_exit_code(worker):
    assert worker_state(worker, "none") == "none"
    assert run("start", *SLICE, "--", *TRAIN).returncode == 0
    assert worker_state(worker, "running") == "running"
    again = run("start", *SLICE, "--", *TRAIN)
    assert again.returncode and "a run is already active" in again.stderr
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
    # scp copies the archive to the worker's home.
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


CREATE_AND_START = ["tpu-vm create", "tpu-vm scp", "tpu-vm ssh", "worker install", "worker start"]
POLL = ["tpu-vm describe", "worker state"]


def test_keep_restarts_after_preemption_and_failure(fake):
    (fake / "states").write_text(
        "NOT_FOUND\nREADY\nPREEMPTED\nNOT_FOUND\nUNAVAILABLE\n" + 4 * "READY\n"
    )
    (fake / "workers").write_text(
        "running,running\nexit 75,exit 75\nexit 134,exit 1\nexit 0,exit 0\n"
    )
    done = keep()
    assert done.returncode == 0, done.stdout + done.stderr
    assert verbs(fake) == [
        "tpu-vm describe", *CREATE_AND_START,
        *POLL,
        "tpu-vm describe", "tpu-vm delete",
        "tpu-vm describe", *CREATE_AND_START,
        "tpu-vm describe",
        *POLL, "worker start",
        *POLL, "worker recorded", "worker start",
        *POLL,
    ]  # fmt: skip


@pytest.mark.parametrize("queued", [[], ["--queued"]], ids=["", "queued"])
def test_keep_deletes_the_slice_when_done_and_retries(queued, fake):
    kind = "queued-resources" if queued else "tpu-vm"
    (fake / "states").write_text("READY\nREADY\nREADY\n")
    (fake / "workers").write_text("running\nexit 0\n")
    # The first deletion fails.
    first = (
        'if [[ "$*" == *delete* && ! -e $FAKE/failed ]]; then touch "$FAKE/failed"; exit 1; fi\n'
    )
    marker = "next() {"
    (fake / "gcloud").write_text(GCLOUD.replace(marker, first + marker))
    done = keep("--delete-when-done", *queued)
    assert done.returncode == 0 and "training is done" in done.stdout
    poll = [f"{kind} describe", "worker state"]
    assert verbs(fake) == [*poll, *poll, f"{kind} delete", f"{kind} describe", f"{kind} delete"]


@pytest.mark.parametrize(
    ("workers", "code"),
    [("exit 0\n", 0), ("exit 2\n", 2), ("exit 65,exit 134\n", 1), ("exit 134,exit 70\n", 1)],
)
def test_keep_leaves_the_slice_without_the_flag_or_if_training_failed(workers, code, fake):
    (fake / "states").write_text("READY\n")
    (fake / "workers").write_text(workers)
    assert keep(*(["--delete-when-done"] if code else [])).returncode == code
    more = ["worker recorded"] if code == 1 else []
    assert verbs(fake) == POLL + more


def test_keep_sets_up_again_if_a_worker_never_started(fake):
    (fake / "states").write_text(3 * "READY\n")
    (fake / "workers").write_text("running,none\nexit 2,none\nexit 0\n")
    assert keep().returncode == 0
    assert verbs(fake) == [*POLL, *POLL, *CREATE_AND_START[1:], *POLL]


@pytest.mark.parametrize(
    ("workers", "code", "words"),
    [
        ("running,exit 2\nexit 0,exit 2\n", 2, "refused its input"),
        (3 * "exit 1,exit 134\n", 1, "too many failures (exit 1, exit 134; the run recorded: "),
        (3 * "exit 75,exit 137\n", 1, "too many failures (exit 137, exit 75; the run recorded: "),
    ],
)
def test_keep_gives_up_on_bad_input_and_after_too_many_failures(workers, code, words, fake):
    (fake / "states").write_text(9 * "READY\n")
    (fake / "workers").write_text(workers)
    done = keep("--max-restarts=2")
    assert done.returncode == code and words in done.stdout


def test_keep_says_what_the_run_recorded_about_a_failure(fake):
    (fake / "states").write_text(9 * "READY\n")
    (fake / "workers").write_text("exit 1\n")
    answer = '  *"worker.sh recorded"*) echo "failed: RunError: no space" ;;\n'
    marker = '  *"worker.sh state"*)'
    (fake / "gcloud").write_text(GCLOUD.replace(marker, answer + marker))
    done = keep("--max-restarts=0")
    assert done.returncode == 1
    assert "(exit 1; the run recorded: failed: RunError: no space)" in done.stdout
    (asked,) = [words for words in calls(fake) if any("recorded" in word for word in words)]
    assert "--worker=0" in asked and any("/mnt/a\\ b" in word for word in asked)


def test_the_jobset_is_valid_with_its_variables_set():
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
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 65, 70]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:4] == ["python", "-m", "imagen_jax.train", "--distributed"]
    # Without it training refuses the devices of several slices.
    assert "--config.mesh.slice=1" in container["command"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_the_files_that_the_container_copies_exist():
    ignore = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert kept and all((ROOT / name).exists() for name in kept)
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and not line.startswith("COPY . "):
            assert all(n.split("/")[0] in kept for n in line.split()[1:-1]), line
