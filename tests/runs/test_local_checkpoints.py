"""Local checkpoints: what is restored is what this run saved, or none is."""

import contextlib
import errno
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.common.errors import UserError
from imagen_jax.formats.tensors import read_safetensors
from imagen_jax.runs.local_checkpoints import LocalCheckpoints
from imagen_jax.sections import CheckpointConfig
from launch import local as processes

IDENTITY = {"model.name": "unet", "model.channel_mult": (1, 2)}
POSITION = {"examples": 8, "window": [{"loss": 0.1}]}


def abstract_state(data=4, fsdp=2):
    mesh = jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def leaf(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = {
        "kernel": leaf((3, 16), jnp.float32, None, "fsdp"),
        "embedding": leaf((16, 6), jnp.bfloat16, ("data", "fsdp")),
        "bias": leaf((5,), jnp.float32),
    }
    return {"params": params, "step": leaf((), jnp.int32)}


def new_state(step, like=None):
    shapes = like or abstract_state()  # the same values, however they are sharded
    rng = np.random.default_rng(step)

    def leaf(x):
        values = rng.normal(size=x.shape, scale=99).astype(x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: values[index])

    return jax.tree.map(leaf, shapes)


@pytest.fixture
def opened(tmp_path):
    """Opens the local checkpoints of a workdir, by default of one and the same."""
    with contextlib.ExitStack() as stack:

        def open_(workdir="run", **keys):
            config = CheckpointConfig(**{"local_dir": str(tmp_path / "disk"), **keys})
            (tmp_path / workdir).mkdir(exist_ok=True)
            local = LocalCheckpoints(tmp_path / workdir, config)
            return stack.enter_context(contextlib.closing(local))

        yield open_


def save(local, *steps, like=None):
    for step in steps:
        local.save(step, new_state(step, like), POSITION, IDENTITY)
    local.wait()


def newest(local, like=None, steps=range(1, 100)):
    return local.newest_whole(like or abstract_state(), steps)


def files(local, step):
    (folder,) = local.directory.glob(f"step_{step}_*")
    return sorted(folder.iterdir())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_state_is_restored_bit_for_bit_though_the_next_step_reuses_its_buffers(opened):
    local, state = opened(), new_state(7)
    local.save(7, state, POSITION, IDENTITY)
    update = functools.partial(jax.tree.map, lambda x: x + 1)
    jax.block_until_ready(jax.jit(update, donate_argnums=0)(state))

    local = opened()
    assert newest(local) == 7 and not local.restored
    found, position = local.restore(abstract_state(), IDENTITY, 7)
    assert position == POSITION and local.restored
    for a, b, like in zip(
        *map(jax.tree.leaves, (found, new_state(7), abstract_state())), strict=True
    ):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert a.sharding == like.sharding


def test_a_shard_that_several_devices_hold_is_written_once(opened):
    local = opened()
    save(local, 7)
    stored = read_safetensors(next(p for p in files(local, 7) if p.suffix == ".safetensors"))
    assert set(stored) == {
        *("params.kernel[0:3,0:8]", "params.kernel[0:3,8:16]", "params.bias[0:5]", "step[]"),
        *(f"params.embedding[{i}:{i + 2},0:6]" for i in range(0, 16, 2)),
    }


@pytest.mark.parametrize("harm", [flip, lambda p: p.write_bytes(b""), lambda p: p.unlink()])
def test_a_damaged_file_is_named_in_one_line_and_the_one_before_is_taken(opened, harm, caplog):
    for number in range(3):
        local = opened(f"run{number}")
        save(local, 1, 2)
        harm(path := files(local, 2)[number])
        caplog.clear()
        assert newest(local) == 1
        (message,) = caplog.messages
        assert f"step 2 left out: {path.name}" in message and "\n" not in message
    shutil.rmtree(files(local, 1)[0].parent)
    assert newest(local) is None


def test_only_wanted_steps_are_found(opened):
    local = opened()
    save(local, 2, 4, 6)
    assert [newest(local, steps=range(*r)) for r in ((5, 7), (1, 6), (1, 4), (7, 9))] == [
        6, 4, 2, None
    ]  # fmt: skip


def test_the_shards_of_another_mesh_or_shape_are_left_out(opened, caplog):
    local = opened()
    save(local, 2)
    assert newest(local, abstract_state(2, 4)) is None
    assert "step 2 left out: it has the shards of another mesh (process 0 on " in caplog.text
    other = abstract_state()
    other["params"]["scale"] = other["params"]["bias"]
    assert newest(local, other) is None
    assert newest(local) == 2


def test_two_stay_while_the_next_is_written_and_none_after_the_end(opened, tmp_path, monkeypatch):
    local, kept, write = opened(), [], safetensors.numpy.save_file

    def listed(*args):
        kept.append(sorted(step for step, _ in local._copies()))
        write(*args)

    monkeypatch.setattr(safetensors.numpy, "save_file", listed)
    save(local, *range(1, 6))
    assert kept == [[], [1], [1, 2], [2, 3], [3, 4]]
    (local.directory / ".step_6_1.tmp").mkdir()
    local.discard_after(4)
    assert [step for step, _ in local._copies()] == [3, 4] and len(
        list(local.directory.iterdir())
    ) == 2
    local.remove()
    assert not any((tmp_path / "disk").iterdir())


def test_runs_that_share_a_disk_never_take_each_others(opened, tmp_path):
    save(opened(), 3)
    assert newest(opened()) == 3
    assert newest(opened("another")) is None
    shutil.copytree(tmp_path / "run", tmp_path / "copied")
    assert newest(opened("copied")) is None
    shutil.rmtree(tmp_path / "run")  # a new run in the same workdir
    assert newest(opened()) is None


def test_another_model_is_refused(opened):
    local = opened()
    save(local, 3)
    assert newest(local) == 3
    with pytest.raises(UserError, match=r"step 3 belongs to another model: config\.model\.name is"):
        local.restore(abstract_state(), IDENTITY | {"model.name": "other"}, 3)


def test_a_save_that_fails_is_one_line_and_the_next_succeeds(opened, monkeypatch, caplog):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    local = opened()
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        save(local, 1)
    (message,) = caplog.messages
    assert message.startswith("step 1  no local checkpoint: --config.checkpoint.local_dir=")
    assert message.endswith("No space left on device") and "\n" not in message
    save(local, 2)
    assert newest(local) == 2 and len(list(local.directory.iterdir())) == 1


def test_they_are_off_by_default(opened, tmp_path):
    local = opened(local_dir="")
    assert not local.due(100) and newest(local) is None
    local.discard_after(0)
    local.remove()
    assert not any((tmp_path / "run").iterdir()) and not (tmp_path / "disk").exists()


def test_a_folder_that_cannot_be_written_is_refused(opened, tmp_path):
    (tmp_path / "disk").write_text("")
    with pytest.raises(UserError, match=r"--config\.checkpoint\.local_dir=.* cannot be written"):
        opened()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"local_dir": "gs://b/c"}, r"checkpoint\.local_dir is 'gs://b/c'; allowed: a folder on a"),
        ({"local_every": 0}, r"checkpoint\.local_every is 0; allowed: 1 or more"),
    ],
)
def test_bad_keys_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        CheckpointConfig(**values)


PROGRAM = """
import contextlib, sys
from pathlib import Path

address, number, tests, folder, act = sys.argv[1:]
sys.path.insert(0, tests)
import conftest, jax

jax.distributed.initialize(address, 2, int(number))
from runs.test_local_checkpoints import *

config = CheckpointConfig(local_dir=f"{folder}/disk")
shapes = abstract_state(8, 2)  # each process has eight devices
with contextlib.closing(LocalCheckpoints(Path(folder), config)) as local:
    if act == "save":
        save(local, 1, 2, like=shapes)
    step = local.newest_whole(shapes, range(1, 9))
    if step:
        found, position = local.restore(shapes, IDENTITY, step)
        for leaf, wanted in zip(*map(jax.tree.leaves, (found, new_state(step, shapes)))):
            for a, b in zip(leaf.addressable_shards, wanted.addressable_shards, strict=True):
                np.testing.assert_array_equal(a.data, b.data)
    print("restored", step)
"""


@pytest.mark.slow
def test_two_processes_take_only_what_both_have_whole_and_saved_together(tmp_path):
    def both(act):
        command = [sys.executable, "-c", PROGRAM, f"localhost:{processes.free_port()}"]
        env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        running = [
            subprocess.Popen(
                [*command, str(i), str(ROOT / "tests"), str(tmp_path), act],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT,
            )
            for i in range(2)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=300)[0] for process in running]
        last, other = (output.splitlines()[-1] for output in outputs)
        assert last == other, outputs
        return last, outputs[0]

    assert both("save")[0] == both("restore")[0] == "restored 2"
    (run,) = (tmp_path / "disk").iterdir()
    (copy,) = (run / "process_1").glob("step_2_*")
    copy.rename(copy.with_name("step_2_1"))  # as another start would have named it
    last, output = both("restore")
    assert last == "restored 1" and "step 2 left out: it is missing (process 1 on " in output
    flip(max((run / "process_1").glob("step_1_*/*"), key=lambda path: path.stat().st_size))
    assert both("restore")[0] == "restored None"
