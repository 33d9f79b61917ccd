"""The command that draws: files that say what they are, resumption, cascades, clear errors."""

import json
import shutil

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import FakeEncoder, load_config, shrink, shrink_sr
from PIL import Image

from imagen_jax import sample
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.pipeline import writer
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.training.experiment import build


def save_run(config, workdir):
    """What sampling needs of a run: its config, and a checkpoint of untrained weights."""
    experiment = build(parse(config))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, experiment.init(), {"examples": 0}, experiment.config.identity)
    checkpoints.close()
    values = {**config.to_dict(), "model": dict(config.model)}
    (workdir / "config.json").write_text(json.dumps(values))
    return str(workdir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base model of 32 pixels and one that enlarges 32 to 64."""
    base, sr = shrink(load_config("demo")), shrink_sr(load_config("sr256", "tiny"))
    return [
        save_run(base, tmp_path_factory.mktemp("base")),
        save_run(sr, tmp_path_factory.mktemp("sr")),
    ]


@pytest.fixture(scope="module")
def defined_flags():
    before = set(flags.FLAGS)
    sample.define_flags()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def draw(defined_flags, monkeypatch, tmp_path):
    """Calls the command with flags; returns the folder it wrote to."""
    monkeypatch.setattr(writer, "load_encoder", lambda name, max_tokens: FakeEncoder())

    def call(*args):
        with flagsaver.flagsaver():
            flags.FLAGS(["sample", f"--out={tmp_path / 'out'}", *args])
            sample.main([])
        return tmp_path / "out"

    return call


@pytest.fixture
def count_drawn(monkeypatch):
    """How many pictures each call of cascade.draw was asked for."""
    drawn, real = [], writer.cascade.sample
    monkeypatch.setattr(
        writer.cascade,
        "sample",
        lambda s, seeds, *a: drawn.append(len(seeds)) or real(s, seeds, *a),
    )
    return drawn


def read(path):
    return np.asarray(Image.open(path))


def test_a_cascade_leaves_pictures_that_say_what_they_are(runs, draw, count_drawn):
    args = [
        f"--workdir={','.join(runs)}", "--prompts=a red circle;two stars", "--num=2", "--seed=5",
        "--guidance=3,1", "--all_stages",
    ]  # fmt: skip
    out = draw(*args)
    listed = json.loads((out / "samples.json").read_text())
    assert [(r["prompt"], r["seed"]) for r in listed] == [
        ("a red circle", 5), ("a red circle", 6), ("two stars", 5), ("two stars", 6)
    ]  # fmt: skip
    stages = list(listed[0]["stages"].values())
    assert [s["guidance_weight"] for s in stages] == [3.0, 1.0]
    for i, record in enumerate(listed):
        picture = Image.open(out / record["file"])
        assert picture.size == (64, 64)
        assert picture.info["prompt"] == record["prompt"] and picture.info["seed"]
        assert json.loads(picture.info["request"])["stages"] == record["stages"]
        assert Image.open(out / "32" / f"{i:05d}.png").size == (32, 32)
    # Two columns, in each both stages side by side.
    assert Image.open(out / "grid.png").size[0] == 8 + 2 * (2 * 128 + 8)
    (out / "32" / "00001.png").unlink()
    draw(*args)
    assert count_drawn == [4, 1]


def test_what_is_there_already_is_not_drawn_again(runs, draw, count_drawn):
    args = [f"--workdir={runs[0]}", "--prompts=a;b;c", "--num=1", "--batch_size=1"]
    out = draw(*args)
    before = [read(out / f"{i:05d}.png") for i in range(3)]
    (out / "00001.png").write_bytes(b"half a pic")
    count_drawn.clear()
    draw(*args)
    assert count_drawn == [1]
    for i in range(3):
        np.testing.assert_array_equal(read(out / f"{i:05d}.png"), before[i])
    draw(*args, "--guidance=2")
    assert count_drawn == [1, 1, 1, 1]


def test_pictures_of_an_older_checkpoint_or_another_run_are_drawn_again(
    runs, draw, count_drawn, tmp_path
):
    first, second = tmp_path / "a" / "base", tmp_path / "b" / "base"
    for copy in (first, second):
        shutil.copytree(runs[0], copy)
    args = ["--prompts=a", "--num=1"]
    draw(f"--workdir={first}", *args)
    draw(f"--workdir={second}", *args)
    assert count_drawn == [1, 1]
    # More training, as far as a picture's record can tell.
    shutil.copytree(second / "checkpoints" / "step_1", second / "checkpoints" / "step_2")
    out = draw(f"--workdir={second}", *args)
    draw(f"--workdir={second}", *args)
    assert count_drawn == [1, 1, 1]
    [record] = json.loads((out / "samples.json").read_text())
    assert record["stages"][str(second)]["step"] == 2
    draw(f"--workdir={second}", *args, "--step=1")
    assert count_drawn == [1, 1, 1, 1]


def test_stages_whose_folders_have_one_name_are_told_apart(runs, draw, tmp_path):
    stages = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for run, link in zip(runs, stages, strict=True):
        link.parent.mkdir()
        link.symlink_to(run)
    out = draw(f"--workdir={stages[0]},{stages[1]}", "--prompts=a", "--num=1", "--guidance=3,1")
    [record] = json.loads((out / "samples.json").read_text())
    assert {k: v["guidance_weight"] for k, v in record["stages"].items()} == {
        str(stages[0]): 3.0, str(stages[1]): 1.0
    }  # fmt: skip


def test_prompts_are_encoded_some_at_a_time(runs, draw, monkeypatch):
    told = []

    class Recording(FakeEncoder):
        def check(self, captions):
            told.append(("check", len(captions)))

        def encode(self, captions, progress=None):
            told.append(("encode", len(captions)))
            return super().encode(captions)

    monkeypatch.setattr(writer, "load_encoder", lambda name, max_tokens: Recording())
    args = (f"--workdir={runs[0]}", "--prompts=a;b;c", "--num=1", "--batch_size=2")
    draw(*args)
    assert told == [("check", 4), ("encode", 2), ("encode", 1)]  # "" is the negative prompt
    told.clear()
    draw(*args)
    assert not told


def test_the_way_between_two_prompts_begins_and_ends_with_them(runs, draw):
    ends = [f"--workdir={runs[0]}", "--prompts=a red circle;two stars", "--num=1"]
    alone = [read(draw(*ends) / f"{i:05d}.png") for i in range(2)]
    out = draw(*ends, "--frames=3")
    assert len(json.loads((out / "samples.json").read_text())) == 3
    np.testing.assert_array_equal(read(out / "00000.png"), alone[0])
    np.testing.assert_array_equal(read(out / "00002.png"), alone[1])


def test_a_users_picture_is_enlarged(runs, draw, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "small.png")
    image = f"--image={tmp_path / 'small.png'}"
    out = draw(f"--workdir={runs[1]}", "--prompts=a", "--num=1", image)
    assert Image.open(out / "00000.png").size == (64, 64)


def test_outside_the_mask_the_picture_stays(runs, draw, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    files = [f"--image={tmp_path / 'image.png'}", f"--mask={tmp_path / 'mask.png'}"]
    out = draw(f"--workdir={runs[0]}", "--prompts=a", "--num=1", "--resample=2", *files)
    np.testing.assert_array_equal(read(out / "00000.png")[:, 16:], pixels[:, 16:])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prompts=a"], "--workdir=DIR is needed"),
        (["--workdir=BASE"], "give either --prompts"),
        (["--workdir=BASE", "--prompts=a;;b"], "--prompts: prompt 2 is empty"),
        (["--workdir=/nowhere", "--prompts=a"], "holds no run: config.json is missing"),
        (["--workdir=SR", "--prompts=a"], "enlarges 32 pixels, but before it comes nothing"),
        (["--workdir=SR,BASE", "--prompts=a"], "enlarges 32 pixels"),
        (["--workdir=BASE", "--prompts=a", "--guidance=-1"], "sampling.guidance_weight is -1.0"),
        (["--workdir=BASE", "--prompts=a", "--guidance=much"], "--guidance is 'much'; it must be"),
        (["--workdir=BASE", "--prompts=a", "--guidance=1,2"], "--guidance has 2 values"),
        (["--workdir=BASE", "--prompts=a", "--steps=0"], "sampling.num_steps is 0"),
        (["--workdir=BASE", "--prompts=a", "--sampler=euler"], "sampling.name is 'euler'; allowed"),
        (["--workdir=BASE", "--prompts=a", "--frames=3"], "--frames=3 with 1 prompts"),
        (["--workdir=BASE", "--prompts=a", "--to_seed=3"], "--to_seed=3 needs --frames"),
        (["--workdir=BASE", "--prompts=a", "--mask=m.png"], "--mask=m.png needs --image"),
        (["--workdir=BASE", "--prompts=a", "--image=none.png"], "there is no such file"),
        (["--workdir=BASE", "--prompts=a;b", "--sr_prompts=a;b;c"], "--sr_prompts has 3 prompts"),
    ],
)
def test_bad_input_is_one_line(runs, draw, args, words):
    where = dict(zip(("BASE", "SR"), runs, strict=True))
    for name, workdir in where.items():
        args = [
            a.replace(f"={name}", f"={workdir}").replace(f",{name}", f",{workdir}") for a in args
        ]
    with pytest.raises(UserError) as e:
        draw(*args)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("workdir", "args", "words"),
    [
        ("SR", ["--image=p.png", "--mask=m.png"], "--mask=m.png needs --image, and a base model"),
        ("SR", ["--image=p.png", "--strength=0.5"], "--strength=0.5 needs --image, no --mask, and"),
        ("BASE", ["--strength=0.5"], "--strength=0.5 needs --image"),
        ("BASE", ["--image=p.png", "--mask=m.png", "--strength=0.5"], "--strength=0.5 needs --i"),
        ("BASE", ["--image=p.png", "--strength=0.5", "--resample=2"], "--resample=2 needs --mask"),
        ("BASE", ["--image=p.png", "--frames=3", "--to_seed=2"], "--to_seed=2 needs no --image"),
        ("BASE", ["--frames=3", "--to_seed=2", "--num=2"], "--num=2 needs no --to_seed"),
        ("BASE", ["--sr_prompts=b"], "--sr_prompts=b needs a base and a super-resolution"),
        ("SR", ["--sr_prompts=b"], "--sr_prompts=b needs a base and a super-resolution"),
        ("BASE", ["--aug_level=0.3"], "--aug_level=0.3 needs a super-resolution --workdir"),
        ("BASE", ["--guidance=1", "--negative_prompt=b"], "--negative_prompt=b needs --guidance"),
        ("BASE", ["--guidance=1", "--guidance_interval=-3,3"], "--guidance_interval=-3,3 needs"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(runs, draw, workdir, args, words):
    where = dict(zip(("BASE", "SR"), runs, strict=True))
    with pytest.raises(UserError) as e:
        draw(f"--workdir={where[workdir]}", "--prompts=a", *args)
    assert words in str(e.value) and "\n" not in str(e.value)
