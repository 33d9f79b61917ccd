"""The dataset: shards, manifest, report and card; the same after an interruption and by many."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import seqio
from conftest import ROOT, load_config
from making import (
    DATE,
    encoded,
    files,
    ingest,
    job,
    jpeg,
    manifest,
    picture,
    report,
    rows,
    write_tar,
    write_tars,
)
from PIL import Image

from data_pipelines.ingestion import jobs, options, run, shards, stage, workers
from data_pipelines.reading import check, tasks  # noqa: F401 (registers the tasks)
from data_pipelines.records import manifest as manifests
from data_pipelines.records import prepared, splits, tfrecord
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse

SIZES = {"shard_size": 8, "validation_fraction": 0.1}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """40 images in 5 tars, one of them twice."""
    folder = tmp_path_factory.mktemp("tars")
    write_tars(folder, 5, 8)
    write_tar(folder / "00005.tar", {"z.jpg": jpeg(3), "z.txt": "a copy"})
    return folder


@pytest.fixture(scope="module")
def whole(tars, tmp_path_factory):
    """The dataset of the tars, made without interruption."""
    return ingest(tmp_path_factory.mktemp("whole"), tars, **SIZES)


def test_the_manifest_describes_the_files(tars, whole):
    fields = manifest(whole)
    assert (fields["name"], fields["date"]) == ("folder", DATE)
    train, validation = fields["splits"]["train"], fields["splits"]["validation"]
    assert [s["records"] for s in train["shards"]] == [8, 8, 8]
    assert validation["records"] == splits.GRID
    for split in (train, validation):
        for shard in split["shards"]:
            data = (whole / shard["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
            assert len(data) == shard["bytes"]
            starts = np.load(whole / f"{shard['file']}.offsets.npy")
            assert len(starts) == shard["records"] + 1 and starts[-1] == len(data)
    assert fields["counts"]["candidates"] == 41 and fields["counts"]["records"] == 40
    assert fields["counts"]["rejected"] == {"duplicate image": 1}
    assert fields["schema"].keys() == {"id", "image", "caption", "category", "scene"}
    [source] = fields["sources"]
    assert (source["kind"], source["parts"]) == ("webdataset", 6)
    assert fields["settings"]["resolution"] == fields["settings"]["min_size"] == 16
    assert manifests.read(whole).keys() == fields.keys() - {"digest"}
    assert [(e["name"], e["detail"]) for e in report(whole)["skipped"]] == [
        ("00005/z", "repeats 00000/000000003")
    ]
    assert not (whole / prepared.WORK).exists()


def test_tfds_and_seqio_read_it(whole):
    found = rows(whole) | rows(whole, "validation")
    assert len(found) == 40
    record = found["00002/000000017"]
    assert record["caption"] == b"picture number 17" and record["image"].shape == (16, 20, 3)
    error = np.abs(record["image"].astype(int) - np.asarray(picture(17)))
    assert error.mean() < 8  # JPEG
    task = seqio.get_mixture_or_task("folder")
    info = prepared.dataset_info(str(whole.parent.parent), "folder")
    assert info.num_examples == {"train": 24, "validation": 16} and info.text_identity is None
    assert task.source.name == "folder"


@pytest.fixture(scope="module")
def large(tars, tmp_path_factory):
    """A config, and data that fit it except that they have no embeddings."""
    data_dir = tmp_path_factory.mktemp("large")
    settings = {"resolution": 64, "min_size": 8, "validation_fraction": 0.5}
    ingest(data_dir, tars / "00000.tar", **settings)
    config = load_config("folder")
    config.data.dir = str(data_dir)
    return config


def test_a_dataset_without_embeddings_says_how_to_make_them(large):
    with pytest.raises(UserError, match=r"no embeddings; make a store with: .*encode_text"):
        check.check_dataset(parse(large))


def test_categories_are_refused_for_images_without(large):
    config = large.copy_and_resolve_references()
    config.data.categories = ("Colors",)
    with pytest.raises(UserError, match="'folder' have no categories; set --config"):
        check.check_dataset(parse(config))


def test_any_number_of_workers_writes_the_same_bytes(tars, whole, tmp_path):
    folder = run.run(job(tmp_path, tars, **SIZES), workers.local(2))
    assert files(folder) == files(whole)


class Stop(Exception):
    pass


@pytest.mark.parametrize(("step", "after"), [("stage", 2), ("write", 1), ("write", 4)])
def test_an_interrupted_run_is_finished_by_the_same_command(
    tars, whole, tmp_path, monkeypatch, step, after
):
    module, function = {"stage": (stage, stage.stage), "write": (shards, shards.write)}[step]
    calls = []

    def counted(task, progress):
        if len(calls) == after:
            raise Stop
        calls.append(task)
        return function(task, progress)

    monkeypatch.setattr(module, step, counted)
    with pytest.raises(Stop):
        ingest(tmp_path, tars, **SIZES)
    with pytest.raises(UserError, match="'folder' is unfinished; run the command that makes it"):
        prepared.find(str(tmp_path), "folder")
    calls.clear()
    after = 100
    folder = ingest(tmp_path, tars, **SIZES)
    assert files(folder) == files(whole)
    total = {"stage": 6, "write": 5}[step]
    assert len(calls) < total  # what was finished is not done again


def test_kill_9_leaves_whole_shards(tars, whole, tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, 'tests'); import making\n"
        "from data_pipelines.ingestion import stage\n"
        "accept = stage._accept\n"
        "stage._accept = lambda *a: (time.sleep(.02), accept(*a))[1]\n"
        f"making.ingest({str(tmp_path)!r}, {str(tars)!r}, **{SIZES})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    work = tmp_path / "folder" / prepared.VERSION / prepared.WORK
    deadline = time.time() + 60
    while time.time() < deadline and len(list(work.glob("*.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = list(work.glob("*.json"))
    assert 2 <= len(finished) < 6 and not (work.parent / prepared.INFO).exists()
    for path in finished:
        with path.with_suffix(".tfrecord").open("rb") as file:
            assert len(list(tfrecord.read_frames(file, "x"))) == len(
                json.loads(path.read_text())["ids"]
            )
    assert files(ingest(tmp_path, tars, **SIZES)) == files(whole)


def test_again_with_other_settings_needs_overwrite(tars, tmp_path, capsys):
    folder = ingest(tmp_path, tars)
    before = files(folder)
    assert ingest(tmp_path, tars) == folder and files(folder) == before
    assert "already prepared" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"was prepared with resolution=16 \(now 8\);.*--overwrite"):
        ingest(tmp_path, tars, resolution=8)
    with pytest.raises(UserError, match=r"source=webdataset \w+ \(now webdataset \w+\)"):
        ingest(tmp_path, tars / "00000.tar")
    with pytest.raises(UserError, match=r"no image of .* passes: smaller than"):
        ingest(tmp_path, tars, resolution=64, overwrite=True)
    write_tar(tmp_path / "no" / "0.tar", {})
    with pytest.raises(UserError, match=r"no image of .*no passes: there is none"):
        ingest(tmp_path, tmp_path / "no", overwrite=True)
    assert files(folder) == before  # the old one is kept if the new one fails
    ingest(tmp_path, tars, resolution=8, overwrite=True)
    assert manifest(folder)["settings"]["resolution"] == 8
    assert os.listdir(folder.parent) == [prepared.VERSION, f"{prepared.VERSION}.new"][:1]


def test_a_changed_folder_is_noticed(tmp_path):
    (tmp_path / "images").mkdir()
    picture(0).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("one")
    folder = ingest(tmp_path, tmp_path / "images")
    assert ingest(tmp_path, tmp_path / "images") == folder
    (tmp_path / "images/a.txt").write_text("two")
    with pytest.raises(UserError, match="was prepared with source="):
        ingest(tmp_path, tmp_path / "images")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _edit(f, '"date": "2026', '"date": "2025'), "edited since it was written"),
        (lambda f: _edit(f, "{", ""), r"manifest.json: damaged \(JSONDecodeError"),
        (lambda f: _edit(f, '"digest"', '"digits"'), r"damaged \(KeyError"),
        (lambda f: next(f.glob("*-00001-of-*")).unlink(), "00001-of-00003.*: missing"),
        (lambda f: next(f.glob("*-00001-of-*3")).write_bytes(b"x"), "00003: 1 bytes; manifest"),
    ],
)
def test_damage_is_noticed(tars, tmp_path, damage, words):
    folder = ingest(tmp_path, tars, **SIZES)
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        ingest(tmp_path, tars, **SIZES)
    assert "\n" not in str(error.value)


def _edit(folder, old, new):
    path = folder / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_near_duplicates_are_dropped_and_the_first_is_kept(tmp_path):
    (tmp_path / "i").mkdir()
    for number, name in enumerate("abc"):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        image = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"i/{name}.png")
        image.save(tmp_path / f"i/{name}_again.jpg", quality=80)
    shutil.copy(tmp_path / "i/a.png", tmp_path / "i/z.png")
    for path in list((tmp_path / "i").iterdir()):
        path.with_suffix(".txt").write_text("caption")
    kept = {
        mode: set(rows(ingest(tmp_path / mode, tmp_path / "i", duplicates=mode)))
        for mode in ("none", "images", "near")
    }
    assert len(kept["none"]) == 7 and kept["none"] - kept["images"] == {"z.png"}
    assert kept["near"] == {"a.png", "b.png", "c.png"}
    counts = manifest(tmp_path / "near/folder/1.0.0")["counts"]["rejected"]
    assert counts == {"near duplicate within --near_distance=4": 3, "duplicate image": 1}


def test_validation_images_stay_when_images_are_added(tmp_path):
    def held_out(num, **options):
        write_tars(tmp_path / f"t{num}", 1, num)
        settings = {"validation_fraction": 0.1, "resolution": 16, **options}
        folder = ingest(tmp_path / f"d{num}{options}", tmp_path / f"t{num}", **settings)
        return set(rows(folder, "validation")), set(rows(folder))

    held, train = held_out(60)
    assert len(held) == 16 and len(train) == 44 and not held & train
    more, _ = held_out(64)
    assert len(held & more) >= 14
    assert held_out(60, seed=1)[0] != held


def test_too_few_for_a_grid_says_so(tmp_path, capsys):
    write_tars(tmp_path / "t", 1, 5)
    ingest(tmp_path / "d", tmp_path / "t", validation_fraction=0.1)
    assert "holding out only 2 of 5 examples: a grid of 16" in capsys.readouterr().err
    assert manifest(tmp_path / "d/folder/1.0.0")["splits"]["validation"]["records"] == 2


def test_several_sources_keep_their_ids_apart(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}/x.tar", {"0.jpg": jpeg(ord(name)), "0.txt": name})
    found = rows(ingest(tmp_path / "d", tmp_path / "a", tmp_path / "b"))
    assert {k: v["caption"] for k, v in found.items()} == {"0/x/0": b"a", "1/x/0": b"b"}


def test_a_full_disk_is_one_line(tars, tmp_path, monkeypatch):
    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device", "x.tfrecord")

    with monkeypatch.context() as patch:
        patch.setattr(tfrecord, "frame", full)
        with pytest.raises(UserError, match=r"^No space left on device \(x.tfrecord\). Finished"):
            ingest(tmp_path, tars, **SIZES)
    ingest(tmp_path, tars, **SIZES)


def test_a_folder_that_cannot_be_written_is_one_line(tars, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"--data_dir=.*file cannot be written: Not a directory"):
        ingest(tmp_path / "file", tars, **SIZES)


def test_the_date_can_be_fixed(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert options.today() == "1970-01-02"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH is 'soon'; it must be seconds"):
        options.today()


def test_the_card_shows_what_happened(tmp_path):
    (tmp_path / "i").mkdir()
    for name, number, size in (("a|b", 0, (20, 16)), ("b", 1, (20, 16)), ("small", 2, (20, 5))):
        picture(number, size).save(tmp_path / f"i/{name}.png")
        (tmp_path / f"i/{name}.txt").write_text(f"a photograph of the {name} <b>town</b>")
    (tmp_path / "i/broken.png").write_bytes(b"no image")
    (tmp_path / "i/broken.txt").write_text("caption")
    folder = ingest(tmp_path, tmp_path / "i")
    text, page = (folder / "card.md").read_text(), (folder / "card.html").read_text()
    for line in (
        "| candidates in | 4 |",
        "| unreadable image | -1 |",
        "| records out | 2 |",
        "| 1.25 to 1.5 | 2 | 100.0% |",
        "| en | 2 | 100.0% |",
        "2 of 2 images have no score `punsafe`",
        "## Left out: smaller than --resolution",
    ):
        assert line in text
    assert "<h2>Random examples</h2>" in page and page.count("<img") == 2
    pictures = sorted((folder / "card").iterdir())
    assert [Image.open(path).format for path in pictures] == ["PNG", "PNG"]
    assert all(f"(card/{path.name})" in text for path in pictures)


@pytest.mark.parametrize("stage_of_config", ["base", "sr"])
def test_the_config_for_folders_needs_no_overrides(tmp_path, monkeypatch, stage_of_config):
    monkeypatch.chdir(tmp_path)  # there are no data here
    config = parse(load_config("folder", stage_of_config))
    command = r"data_pipelines.ingest --source=FOLDER --name=folder --data_dir=data$"
    with pytest.raises(UserError, match=command):
        check.check_prepared(config)


def test_embeddings_are_beside_the_records_and_read_with_them(tmp_path):
    (tmp_path / "i").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / f"i/{i}.png")
        (tmp_path / f"i/{i}.txt").write_text(f"number {i}\nagain {i}")
    embed = jobs.embedding("byte-tiny", 64)
    settings = {"encoder": "byte-tiny", "max_tokens": 64}
    folder = ingest(tmp_path, tmp_path / "i", embed=embed, **settings)
    [path] = prepared.own_store(str(tmp_path), "folder")
    assert path == str(folder / prepared.STORE)
    info = prepared.dataset_info(str(tmp_path), "folder")
    assert info.text_identity["encoder"] == "byte-tiny" and info.text_identity["max_tokens"] == 64
    assert json.loads((folder / prepared.STORE / "report.json").read_text())["captions"] == 8
    task = seqio.get_mixture_or_task("folder")
    task = task.replace(source=task.source.at(data_dir=str(tmp_path)))
    found = list(task.get_dataset(split="train", shuffle=False).as_numpy_iterator())
    assert [row["text_embeddings"].shape for row in found] == [(9, 128)] * 4


def test_a_png_of_the_right_size_keeps_its_bytes(tmp_path):
    data = encoded(picture(0, (16, 16)))
    write_tar(tmp_path / "x.tar", {"a.png": data, "a.txt": "same"})
    folder = ingest(tmp_path, tmp_path / "x.tar")
    with next(folder.glob("*train*-of-00001")).open("rb") as file:
        [framed] = tfrecord.read_frames(file, "x")
    assert tfrecord.decode(tfrecord.data_of(framed))["image"] == [data]
