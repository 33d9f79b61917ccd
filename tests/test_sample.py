"""The sampling command: images with their settings, resumption, cascades, clear errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import FakeEncoder
from PIL import Image
from saved_runs import ShortEncoder

import imagen_jax
from imagen_jax import sample
from imagen_jax.common.errors import UserError
from imagen_jax.pipeline import cascade
from imagen_jax.text.encoder import load_encoder


@pytest.fixture(scope="module")
def defined_flags():
    before = set(flags.FLAGS)
    sample.define_flags()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def command(defined_flags, monkeypatch, tmp_path):
    """Calls the command with flags; returns the folder it wrote to."""
    monkeypatch.setattr(cascade, "load_encoder", lambda name, max_tokens: FakeEncoder())

    def call(*args):
        with flagsaver.flagsaver():
            flags.FLAGS(["sample", f"--out={tmp_path / 'out'}", *args])
            sample.main([])
        return tmp_path / "out"

    return call


@pytest.fixture
def batches_sampled(monkeypatch):
    """The number of samples in each batch that goes through the cascade."""
    sizes, real = [], cascade.Cascade._sample_batch

    def counting(self, job, requests, bars):
        sizes.append(len(requests))
        return real(self, job, requests, bars)

    monkeypatch.setattr(cascade.Cascade, "_sample_batch", counting)
    return sizes


def read(path):
    return np.asarray(Image.open(path))


def test_images_of_a_cascade_record_their_settings(cascade_runs, command, batches_sampled):
    args = [
        f"--workdir={','.join(cascade_runs)}", "--prompts=a red circle;two stars", "--num=2",
        "--seed=5", "--guidance=3,1", "--all_stages",
    ]  # fmt: skip
    out = command(*args)
    listed = json.loads((out / "samples.json").read_text())
    assert [(r["prompt"], r["seed"]) for r in listed] == [
        ("a red circle", 5), ("a red circle", 6), ("two stars", 5), ("two stars", 6)
    ]  # fmt: skip
    stages = list(listed[0]["stages"].values())
    assert [s["guidance_weight"] for s in stages] == [3.0, 1.0]
    for i, record in enumerate(listed):
        image = Image.open(out / record["file"])
        assert image.size == (64, 64)
        assert image.info["prompt"] == record["prompt"] and image.info["seed"]
        assert json.loads(image.info["request"])["stages"] == record["stages"]
        assert Image.open(out / "32" / f"{i:05d}.png").size == (32, 32)
    # Two columns, each with both stages side by side.
    assert Image.open(out / "grid.png").size[0] == 8 + 2 * (2 * 128 + 8)
    (out / "32" / "00001.png").unlink()
    command(*args)
    assert batches_sampled == [4, 1]


def test_python_gives_the_images_of_the_command(cascade_runs, command):
    out = command(
        f"--workdir={cascade_runs[0]}", "--prompts=a;b", "--num=2", "--guidance=3", "--seed=5"
    )
    images = imagen_jax.load(cascade_runs[0])(["a", "b"], num=2, guidance=3, seed=5)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(image), read(out / f"{i:05d}.png"))


def test_existing_images_are_kept(cascade_runs, command, batches_sampled):
    args = [f"--workdir={cascade_runs[0]}", "--prompts=a;b;c", "--num=1", "--batch_size=1"]
    out = command(*args)
    before = [read(out / f"{i:05d}.png") for i in range(3)]
    (out / "00001.png").write_bytes(b"half a pic")
    batches_sampled.clear()
    command(*args)
    assert batches_sampled == [1]
    for i in range(3):
        np.testing.assert_array_equal(read(out / f"{i:05d}.png"), before[i])
    command(*args, "--guidance=3")
    assert batches_sampled == [1, 1, 1, 1]


def test_images_of_another_checkpoint_or_run_are_replaced(
    cascade_runs, command, batches_sampled, tmp_path
):
    first, second = tmp_path / "a" / "base", tmp_path / "b" / "base"
    for copy in (first, second):
        shutil.copytree(cascade_runs[0], copy)
    args = ["--prompts=a", "--num=1"]
    command(f"--workdir={first}", *args)
    command(f"--workdir={second}", *args)
    assert batches_sampled == [1, 1]
    # As if it had trained further.
    shutil.copytree(second / "checkpoints" / "step_1", second / "checkpoints" / "step_2")
    out = command(f"--workdir={second}", *args)
    command(f"--workdir={second}", *args)
    assert batches_sampled == [1, 1, 1]
    [record] = json.loads((out / "samples.json").read_text())
    assert record["stages"][str(second)]["step"] == 2
    command(f"--workdir={second}", *args, "--step=1")
    assert batches_sampled == [1, 1, 1, 1]


def test_stages_with_the_same_folder_name_are_kept_apart(cascade_runs, command, tmp_path):
    stages = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for run, link in zip(cascade_runs, stages, strict=True):
        link.parent.mkdir()
        link.symlink_to(run)
    out = command(f"--workdir={stages[0]},{stages[1]}", "--prompts=a", "--num=1", "--guidance=3,1")
    [record] = json.loads((out / "samples.json").read_text())
    assert {k: v["guidance_weight"] for k, v in record["stages"].items()} == {
        str(stages[0]): 3.0, str(stages[1]): 1.0
    }  # fmt: skip


def test_prompts_are_checked_first_and_encoded_batch_by_batch(cascade_runs, command, monkeypatch):
    calls = []

    class Recording(FakeEncoder):
        def num_tokens(self, caption):
            calls.append("check")
            return super().num_tokens(caption)

        def encode(self, captions, progress=None):
            embeddings = super().encode(captions)
            del calls[-len(captions) :]  # the fake counts its tokens once more
            calls.append(len(captions))
            return embeddings

    monkeypatch.setattr(cascade, "load_encoder", lambda name, max_tokens: Recording())
    args = (f"--workdir={cascade_runs[0]}", "--prompts=a;b;c", "--num=1", "--batch_size=2")
    command(*args)
    assert calls == ["check"] * 4 + [2, 1]  # the fourth is "", the negative prompt
    calls.clear()
    command(*args)
    assert not calls


def test_long_prompts_can_be_truncated(cascade_runs, command, monkeypatch):
    monkeypatch.setattr(cascade, "load_encoder", lambda name, max_tokens: ShortEncoder())
    args = (f"--workdir={cascade_runs[0]}", "--num=1")
    with pytest.raises(UserError, match=r"^--truncate_prompts is needed: prompt 'abcdefgh' has 9"):
        command(*args, "--prompts=abcdefgh")
    cut = read(command(*args, "--prompts=abcdefgh", "--truncate_prompts") / "00000.png")
    np.testing.assert_array_equal(cut, read(command(*args, "--prompts=abcde") / "00000.png"))


def test_an_interpolation_begins_and_ends_with_its_prompts(cascade_runs, command):
    ends = [f"--workdir={cascade_runs[0]}", "--prompts=a red circle;two stars", "--num=1"]
    alone = [read(command(*ends) / f"{i:05d}.png") for i in range(2)]
    out = command(*ends, "--frames=3")
    assert len(json.loads((out / "samples.json").read_text())) == 3
    np.testing.assert_array_equal(read(out / "00000.png"), alone[0])
    np.testing.assert_array_equal(read(out / "00002.png"), alone[1])


def test_a_photo_of_any_size_is_enlarged(cascade_runs, command, tmp_path):
    Image.new("RGBA", (50, 40), "red").save(tmp_path / "photo.png")
    image = f"--image={tmp_path / 'photo.png'}"
    out = command(f"--workdir={cascade_runs[1]}", "--prompts=a", "--num=1", image)
    assert Image.open(out / "00000.png").size == (64, 64)


def test_nothing_changes_outside_the_mask(cascade_runs, command, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    files = [f"--image={tmp_path / 'image.png'}", f"--mask={tmp_path / 'mask.png'}"]
    out = command(f"--workdir={cascade_runs[0]}", "--prompts=a", "--num=1", "--resample=2", *files)
    np.testing.assert_array_equal(read(out / "00000.png")[:, 16:], pixels[:, 16:])


def test_the_released_model_is_the_default(command, monkeypatch):
    monkeypatch.setattr(cascade, "load_encoder", load_encoder)  # `command` has replaced it
    args = ["--prompts=a large red circle on a white background", "--num=1", "--steps=2"]
    out = command(*args)
    assert Image.open(out / "00000.png").size == (256, 256)
    stages = json.loads((out / "samples.json").read_text())[0]["stages"]
    assert [Path(name).parent.name for name in stages] == ["scenes", "scenes"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--workdir=BASE"], "give either --prompts"),
        (["--workdir=BASE", "--prompts=a;;b"], "--prompts: prompt 2 is empty"),
        (["--workdir=/nowhere", "--prompts=a"], "holds no run: config.json is missing"),
        (["--workdir=SR", "--prompts=a"], "enlarges 32 pixels, but is the first stage; give an"),
        (["--workdir=SR,BASE", "--prompts=a"], "is a base model, but follows"),
        (["--workdir=BASE", "--prompts=a", "--guidance=-1"], "--guidance is -1.0; allowed: 0 or"),
        (["--workdir=BASE", "--prompts=a", "--guidance=much"], "--guidance is 'much'; it must be"),
        (["--workdir=BASE", "--prompts=a", "--guidance=1,2"], "--guidance has 2 values"),
        (["--workdir=BASE", "--prompts=a", "--steps=0"], "--steps is 0; allowed: 1 or more"),
        (["--workdir=BASE", "--prompts=a", "--sampler=euler"], "--sampler is 'euler'; allowed"),
        (["--workdir=BASE", "--prompts=a", "--num=0"], "--num is 0; allowed: a whole number"),
        (["--workdir=BASE", "--prompts=a", "--frames=3"], "--frames=3 with 1 prompt(s)"),
        (["--workdir=BASE", "--prompts=a", "--to_seed=3"], "--to_seed=3 needs frames"),
        (["--workdir=BASE", "--prompts=a", "--mask=m.png"], "--mask=m.png needs an image"),
        (["--workdir=BASE", "--prompts=a", "--image=none.png"], "--image=none.png: no such file"),
        (["--workdir=BASE", "--prompts=a;b", "--sr_prompts=a;b;c"], "--sr_prompts has 3 prompts"),
        (["--workdir=BASE", "--prompts=a", "--ema=wide"], "--ema is 'wide'; allowed: numbers"),
        (["--workdir=BASE", "--prompts=a", "--ema=0.1,0.1"], "--ema has 2 values; allowed: 1, or"),
        (["--workdir=BASE", "--prompts=a", "--ema=0.1"], "--ema is set, but BASE keeps no snapsh"),
    ],
)
def test_bad_input_is_a_one_line_error(cascade_runs, command, args, words):
    where = dict(zip(("BASE", "SR"), cascade_runs, strict=True))
    for name, workdir in where.items():
        args = [
            a.replace(f"={name}", f"={workdir}").replace(f",{name}", f",{workdir}") for a in args
        ]
    with pytest.raises(UserError) as e:
        command(*args)
    message = str(e.value).replace(where["BASE"], "BASE")
    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    ("workdir", "args", "words"),
    [
        ("SR", ["--image=p.png", "--mask=m.png"], "--mask=m.png needs an image, and a base model"),
        ("SR", ["--image=p.png", "--strength=0.5"], "--strength=0.5 needs an image, no mask, and"),
        ("BASE", ["--strength=0.5"], "--strength=0.5 needs an image"),
        ("BASE", ["--image=p.png", "--mask=m.png", "--strength=0.5"], "--strength=0.5 needs an im"),
        ("BASE", ["--image=p.png", "--strength=0.5", "--resample=2"], "--resample=2 needs a mask"),
        ("BASE", ["--image=p.png", "--frames=3", "--to_seed=2"], "--to_seed=2 needs no image"),
        ("BASE", ["--frames=3", "--to_seed=2", "--num=2"], "--num=2 needs no to_seed"),
        ("BASE", ["--sr_prompts=b"], "--sr_prompts=b needs a base model and a super-resolution"),
        (
            "SR",
            ["--image=p.png", "--sr_prompts=b"],
            "--sr_prompts=b needs a base model and a super",
        ),
        ("BASE", ["--aug_level=0.3"], "--aug_level=0.3 needs a super-resolution stage"),
        ("BASE", ["--guidance=1", "--negative_prompt=b"], "--negative_prompt=b needs guidance"),
        ("BASE", ["--guidance=1", "--guidance_interval=-3,3"], "--guidance_interval=-3,3 needs"),
    ],
)
def test_a_flag_without_effect_is_refused(cascade_runs, command, workdir, args, words):
    where = dict(zip(("BASE", "SR"), cascade_runs, strict=True))
    with pytest.raises(UserError) as e:
        command(f"--workdir={where[workdir]}", "--prompts=a", *args)
    assert words in str(e.value) and "\n" not in str(e.value)
