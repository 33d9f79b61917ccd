"""The processes of a run join, compare settings, train like one process, and stop together."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_config, shrink, train_run
from PIL import Image

from imagen_jax import train
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.devices import processes, rendezvous, sharding
from launch import local

STEPS = 2000
CONFIG_FILE = """
import json, pathlib
from ml_collections import ConfigDict
from imagen_jax.devices import sharding

assert sharding.MIN_SHARDED_SIZE
sharding.MIN_SHARDED_SIZE = 64  # so that these small weights are sharded too

def get_config():
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""
# Child processes compile without optimization and have one device each.
ENV = {
    **os.environ,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "XLA_FLAGS": "",
}


@pytest.fixture(scope="module", autouse=True)
def restore_min_sharded_size():
    """This process loads the config file too, which changes MIN_SHARDED_SIZE for later tests."""
    size = sharding.MIN_SHARDED_SIZE
    yield
    sharding.MIN_SHARDED_SIZE = size


@pytest.fixture(scope="module")
def values(tiny_data):
    """Config values of a run of one process; runs of many differ in the mesh."""
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    values["model"].update(image_size=16, channel_mult=(1,))
    values.update(
        num_steps=STEPS, log_every=1, eval_every=3, eval_batches=1, sample_every=3, num_samples=2,
        checkpoint_every=STEPS,
    )  # fmt: skip
    return values


@pytest.fixture(scope="module")
def config_file(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG_FILE)
    many = {**values, "mesh": {"data": 1, "fsdp": -1}}
    path.with_suffix(".json").write_text(json.dumps(many))
    return path


class StopAt:
    def __init__(self, step):
        self.step = step

    def __call__(self, step):
        return step == self.step


def meet(num_processes, present, settings=lambda i: {}, timeout=1.0):
    """Calls rendezvous.meet in the processes `present`.

    Returns for each the numbers of the processes it is connected to, or its error.
    """
    address = f"localhost:{local.free_port()}"

    def one(i):
        try:
            return close(rendezvous.meet(address, num_processes, i, settings(i), timeout))
        except UserError as e:
            return str(e)

    with concurrent.futures.ThreadPoolExecutor(len(present)) as pool:
        return list(pool.map(one, present))


def close(connections):
    for connection in connections.values():
        connection.close()
    return sorted(connections)


def test_processes_with_equal_settings_join():
    same = {"config": {"model": {"channel_mult": (1, 2)}, "seed": 0}}
    assert meet(5, range(5), lambda i: same) == [[1, 2, 3, 4], [0], [0], [0], [0]]


def test_every_process_names_the_missing_ones():
    lines = meet(6, [0, 2, 5])
    assert len(set(lines)) == 1
    assert lines[0] == (
        "3 of 6 processes did not join within --join_timeout=1 seconds; missing: process 1, 3, 4"
    )


def test_a_missing_process_0_is_named_with_its_address():
    (line,) = meet(2, [1])
    assert re.match(r"process 0 did not answer at localhost:\d+ within --join_timeout=1 sec", line)


def test_every_process_names_the_first_key_that_differs():
    def settings(i):
        return {"workdir": "w", "config": {"seed": 0, "model": {"embed_dim": 8 + 8 * (i == 1)}}}

    lines = meet(3, range(3), settings, timeout=5.0)
    assert len(set(lines)) == 1
    assert "config.model.embed_dim is 8 on process 0 and 16 on process 1" in lines[0]


HELLO = {"protocol": rendezvous.PROTOCOL, "process_id": 1, "settings": {}}
HOSTILE = [
    b"",
    b"\n",
    b"\0\xff\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\n",
    b"[]\n",
    b"{}\n",
    b"[" * 100_000 + b"\n",
    b"1" * 5_000 + b"\n",
    b"x" * (rendezvous.LONGEST + 2) + b"\n",
    *(
        json.dumps(HELLO | change).encode() + b"\n"
        for change in (
            {"protocol": "imagen_jax rendezvous 0"},
            *({"process_id": i} for i in ("1", True, None, 0, -1, 1.0, 1e400, 10**30, [], {})),
            *({"settings": s} for s in (None, [], "x", 1)),
        )
    ),
]


def test_strangers_neither_join_nor_end_nor_delay_a_run():
    port = local.free_port()
    address = f"localhost:{port}"

    def knock(message):
        for _ in range(200):
            with contextlib.suppress(OSError):
                client = socket.create_connection(("localhost", port))
                client.sendall(message)
                return client
            time.sleep(0.05)

    with concurrent.futures.ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        first = pool.submit(rendezvous.meet, address, 2, 0, {"a": 1}, 60.0)
        for message in HOSTILE:
            with contextlib.suppress(OSError):  # a client that is cut off cannot send the rest
                stack.enter_context(knock(message))  # and stays connected
        stack.enter_context(knock(b'{"half'))
        begin = time.monotonic()
        second = pool.submit(rendezvous.meet, address, 2, 1, {"a": 1}, 60.0)
        assert close(second.result()) == [0] and close(first.result()) == [1]
        assert time.monotonic() - begin < rendezvous.MESSAGE * 4


def test_a_stranger_at_the_address_of_process_0_is_not_believed():
    answers = [b"[]\n", b'{"problem": "stop"}\n', b"\xff\n"]
    answers.append(json.dumps({"protocol": rendezvous.PROTOCOL, "problem": 3}).encode() + b"\n")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            process = pool.submit(rendezvous.meet, f"localhost:{port}", 2, 1, {}, 60.0)
            good = json.dumps({"protocol": rendezvous.PROTOCOL, "problem": ""}).encode() + b"\n"
            for answer in [*answers, good]:
                with server.accept()[0] as connection:
                    connection.recv(2**16)
                    connection.sendall(answer)
            assert close(process.result()) == [0]


def test_a_slurm_job_is_found_from_its_variables(monkeypatch):
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    for name, value in zip(names, ("7", "node[003-005],x", "3", "1", "0"), strict=True):
        monkeypatch.setenv(f"SLURM_{name}", value)
    job = processes.discover(1)
    assert (job.num_processes, job.process_id) == (3, 1)
    assert job.coordinator.startswith("node003:")


def test_a_gke_job_is_found_from_its_variables(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost")
    for name, value in {"SLICE_ID": "1", "NUM_SLICES": "2"}.items():
        monkeypatch.setenv(f"MEGASCALE_{name}", value)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    assert processes.discover(1) == processes.Job("localhost:8482", 4, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_processes": 2}, "--num_processes is 2; it needs --coordinator"),
        ({"coordinator": "here"}, "--coordinator is 'here'; allowed: host:port"),
        ({"coordinator": "here:1", "process_id": 1}, "--process_id is 1; allowed: 0 to 0"),
        ({"coordinator": "here:1", "join_timeout": 0}, "--join_timeout is 0; allowed: 1 second"),
        ({"distributed": True}, "--distributed found no Cloud TPU VM, GKE, SLURM or MPI job;"),
        ({"workdir": "s3://bucket/run"}, "--workdir is 's3://bucket/run'; it must be a folder"),
        ({"workdir": None, "distributed": True}, "--workdir=DIR is needed with several processes"),
        ({"workdir": None, "coordinator": "here:1"}, "--workdir=DIR is needed with several"),
    ],
    ids=["alone", "address", "id", "timeout", "nowhere", "bucket", "default", "default of one"],
)
def test_bad_flags_are_named_in_the_error(changes, words, config_file, tmp_path, monkeypatch):
    flags = {
        "config": str(config_file), "set": [], "workdir": str(tmp_path), "distributed": False,
        "coordinator": "", "num_processes": 1, "process_id": 0, "join_timeout": 1,
        "heartbeat_timeout": 100, "profile_steps": "", "replay_step": None,
    }  # fmt: skip
    monkeypatch.setattr(train, "FLAGS", types.SimpleNamespace(**{**flags, **changes}))
    with pytest.raises(UserError, match=re.escape(words)):
        train.main([])


def test_hosts_that_differ_all_exit_2_with_the_same_line(config_file, tmp_path):
    command = [sys.executable, "-m", "imagen_jax.train", f"--config={config_file}"]
    command += [f"--coordinator=localhost:{local.free_port()}", "--num_processes=2"]
    running = [
        subprocess.Popen(
            [
                *command,
                f"--workdir={tmp_path}",
                f"--process_id={i}",
                f"--config.batch_size={8 + i}",
            ],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=ENV,
        )
        for i in range(2)
    ]
    for process in running:
        err = process.communicate(timeout=300)[1]
        line = "error: the processes differ: config.batch_size is 8 on process 0 and 9 on process 1"
        assert process.returncode == 2 and err.startswith(line) and err.count("\n") == 1, err


def metrics(workdir, key="loss"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m[key] for m in lines if key in m}


def children(pid):
    """Returns the child processes of `pid` as process_id -> PID."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        ids = [w.removeprefix("--process_id=") for w in words if w.startswith("--process_id=")]
        found.update({int(i): int(child) for i in ids})
    return found


def train_and_preempt(num_processes, config_file, workdir, *flags):
    """Trains with launch.local to step 4 or later, then sends SIGTERM to the last process.

    Returns the step at which all processes stopped.
    """
    command = [sys.executable, "-m", "launch.local", f"--num_processes={num_processes}", "--"]
    command += [f"--config={config_file}", f"--workdir={workdir}", *flags]
    output, last = "", None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=ENV
    ) as process:
        for line in process.stdout:
            output += line
            step = re.match(r"\[0\] step (\d+)/", line)
            if step and int(step[1]) >= 4 and not last:
                last = children(process.pid)[num_processes - 1]
                os.kill(last, signal.SIGTERM)
    assert process.returncode == train.STOPPED, output
    stops = re.findall(r"\[(\d)\] .*Reached preemption sync point, step=(\d+)", output)
    assert {int(i) for i, _ in stops} == set(range(num_processes)), output
    assert len({step for _, step in stops}) == 1, output
    step = int(stops[0][1])
    saved = workdir / "checkpoints" / f"step_{step}" / "state"
    assert len(list(saved.glob("ocdbt.process_*"))) == num_processes
    return step


def check_against_one_process(values, workdir, reference, step):
    """Resumes the run that stopped at `step` in one process; it must equal a run of one process."""
    config = parse(values)
    for run in (workdir, reference):
        assert not train_run(config, run, StopAt(step + 1))
    assert metrics(workdir) == pytest.approx(metrics(reference), rel=0, abs=1e-5)
    ours, theirs = metrics(workdir, "eval_loss"), metrics(reference, "eval_loss")
    assert 3 in ours
    assert ours == pytest.approx(theirs, rel=0, abs=1e-5)
    grids = [np.asarray(Image.open(w / "samples/step_00000003.png")) for w in (workdir, reference)]
    np.testing.assert_allclose(*grids, atol=1)


def test_two_processes_train_like_one_and_stop_together(config_file, values, tmp_path):
    step = train_and_preempt(2, config_file, tmp_path / "two")
    check_against_one_process(values, tmp_path / "two", tmp_path / "one", step)


@pytest.mark.slow
def test_two_processes_resume_from_their_local_checkpoints_while_both_have_them(
    config_file, values, tmp_path
):
    workdir, disk = tmp_path / "two", tmp_path / "disk"
    flags = [f"--config.checkpoint.local_dir={disk}", "--config.checkpoint.local_every=1"]
    for _ in range(2):
        train_and_preempt(2, config_file, workdir, *flags)
    (folder,) = disk.glob("*/process_1")
    shutil.rmtree(folder)
    step = train_and_preempt(2, config_file, workdir, *flags)
    starts = (workdir / "starts.jsonl").read_text().splitlines()
    assert [json.loads(s)["restored"] for s in starts] == ["", "local_dir", "workdir"]
    check_against_one_process(values, workdir, tmp_path / "one", step)


@pytest.mark.slow
def test_a_run_resumes_with_two_processes_after_four_and_with_one_after_two(
    config_file, values, tmp_path
):
    # With tensor=2, two processes read the same rows.
    first = train_and_preempt(4, config_file, tmp_path / "many", "--config.mesh.tensor=2")
    second = train_and_preempt(2, config_file, tmp_path / "many")
    assert second > first
    check_against_one_process(values, tmp_path / "many", tmp_path / "one", second)


def test_sigterm_ends_at_once_before_training_and_the_first_ctrl_c_says_what_happens(tmp_path):
    """JAX's handler is not one of Python's; here faulthandler has one, which must come back."""
    program = f"""
import faulthandler, hashlib, os, signal
from imagen_jax.devices import processes
dump = open({str(tmp_path / "dump")!r}, "w")
faulthandler.register(signal.SIGTERM, dump)
with processes.stopping_at_once():
    pass
os.kill(os.getpid(), signal.SIGTERM)
stop = processes.StopRequest()
assert not stop(1)
os.kill(os.getpid(), signal.SIGINT)
assert stop(2)
processes.StopRequest()  # before its first step
os.kill(os.getpid(), signal.SIGTERM)
# A call that returns in hours: Python's own handlers would have to wait for it.
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=300)
    assert done.returncode == train.STOPPED, done.stderr
    assert done.stderr.splitlines() == [
        "stopping after the current steps, then saving; a second Ctrl-C ends at once",
        "stopped before training began; the same command starts again",
    ]
    assert "most recent call first" in (tmp_path / "dump").read_text()
