"""A user's folder of images becomes records, and the report lists every file left out."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import seqio
from conftest import load_config
from encoders import ByteEncoder
from PIL import Image

from data_pipelines import folder
from data_pipelines.reading import check, tasks
from data_pipelines.records import captions, dataset, writing
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse


def save(path, color=(200, 30, 40), size=(80, 70), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def build(data_dir, images, **options):
    options = {"resolution": 16, "min_size": 8, "validation_fraction": 0.0, **options}
    builder = folder.Folder(
        data_dir=str(data_dir), images=str(images), encoder=ByteEncoder(), **options
    )
    path = writing.prepare(builder)
    return path, json.loads((path / dataset.REPORT).read_text())


def read(data_dir, split="train"):
    task = seqio.get_mixture_or_task("folder")
    task = task.replace(source=task.source.at(data_dir=str(data_dir)))
    dataset = task.get_dataset(split=split, shuffle=False, try_in_mem_cache=False)
    return {row["id"].decode(): row for row in dataset.as_numpy_iterator()}


def test_precedence_of_text_files_and_lists(tmp_path):
    images = tmp_path / "images"
    for name in ("a.jpg", "b.png", "deep/er/c.webp", "d.BMP", "e.jpeg"):
        save(images / name)
    (images / "a.txt").write_text("from\n the  text file\n")
    (images / "b.txt").write_text("loses to both lists")
    (images / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "from jsonl"}\n'
        '\n{"file_name": "deep/er/c.webp", "caption": "größer"}\n'
    )
    (images / "captions.csv").write_text('file_name,caption\nb.png,loses\nd.BMP,"one, two"\n')
    (images / "e.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    _, report = build(tmp_path, images)
    rows = read(tmp_path)
    assert {name: row["caption"].decode() for name, row in rows.items()} == {
        "a.jpg": "from the text file",
        "b.png": "from jsonl",
        "d.BMP": "one, two",
        "deep/er/c.webp": "größer",
        "e.jpeg": "with a mark",
    }
    assert list(rows) == sorted(rows)
    assert [(s["reason"], s["detail"]) for s in report["skipped"]] == [("duplicate entry", "b.png")]


def test_the_report_lists_every_reason_to_skip(tmp_path, capsys):
    images = tmp_path / "images"
    for name in ("good.png", "no.png", "empty.png", "latin.png", "long.png"):
        save(images / name)
    save(images / "small.png", size=(7, 90))
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(
        whole, "PNG"
    )
    (images / "cut.png").write_bytes(whole.getvalue()[:5000])
    for name in ("good", "small", "broken", "cut", "orphan"):
        (images / f"{name}.txt").write_text("fine")
    (images / "empty.txt").write_text(" \n")
    (images / "latin.txt").write_bytes("größer".encode("latin-1"))
    (images / "long.txt").write_text("x" * 40)  # and an end token
    (images / "movie.gif").write_bytes(b"GIF")
    (images / "metadata.jsonl").write_text(
        '{"file_name": "gone.png", "text": "x"}\n{oops\n[1]\n{"file_name": "good.png", "text": 3}\n'
    )
    _, report = build(tmp_path, images)
    assert report["records"] == {"train": 1}
    assert {(s["name"], s["reason"]) for s in report["skipped"]} == {
        ("no.png", "missing caption"),
        ("empty.png", "empty caption"),
        ("latin.png", "caption not UTF-8"),
        ("long.png", "caption longer than --max_tokens=40"),
        ("small.png", "smaller than --min_size=8"),
        ("broken.jpg", "unreadable image"),
        ("cut.png", "unreadable image"),
        ("orphan.txt", "caption without an image"),
        ("movie.gif", "unsupported file type"),
        ("metadata.jsonl:1", "listed file missing"),
        ("metadata.jsonl:2", "unreadable entry"),
        ("metadata.jsonl:3", "unreadable entry"),
        ("metadata.jsonl:4", "unreadable entry"),
    }
    assert "skipped 13: unreadable entry 3, unreadable image 2," in capsys.readouterr().err


def test_images_become_upright_opaque_rgb_squares(tmp_path):
    images = tmp_path / "images"
    red, blue = (255, 0, 0), (0, 0, 255)
    halves = Image.new("RGB", (80, 60), red)
    halves.paste(blue, (0, 0, 40, 60))  # on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # rotates clockwise: blue is at the top
    images.mkdir()
    halves.save(images / "turned.jpg", exif=exif, quality=95)
    halves.save(images / "plain.png")
    halves.convert("CMYK").save(images / "cmyk.jpg")
    save(images / "clear.png", (255, 0, 0, 0), mode="RGBA")
    save(images / "half.webp", (255, 0, 0, 128), mode="RGBA", lossless=True)
    save(images / "gray.png", 100, mode="L")
    save(images / "deep.png", 100 * 257, mode="I;16")
    palette = Image.new("P", (80, 60), 0)
    palette.putpalette([255, 0, 0])
    palette.save(images / "palette.png", transparency=0)
    for image in list(images.iterdir()):
        image.with_suffix(".txt").write_text("caption")
    build(tmp_path, images)
    rows = {name: row["image"].astype(int) for name, row in read(tmp_path).items()}
    assert len(rows) == 8 and all(image.shape == (16, 16, 3) for image in rows.values())

    def close(pixels, color, tolerance=0):
        assert np.abs(pixels - color).max() <= tolerance

    close(rows["turned.jpg"][:6], blue, 12)
    close(rows["turned.jpg"][10:], red, 12)
    close(rows["plain.png"][:, :6], blue)
    close(rows["plain.png"][:, 10:], red)
    assert rows["cmyk.jpg"][0, 0].argmax() == 2
    close(rows["clear.png"], 255)
    close(rows["half.webp"], (255, 127, 127), 1)
    close(rows["gray.png"], 100)
    close(rows["deep.png"], 100)
    close(rows["palette.png"], 255)


def test_shrinking_averages_pixels():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    small = folder.square(Image.fromarray(checks.astype(np.uint8)), 8)
    assert np.abs(np.asarray(small).astype(int) - 127).max() <= 2


def hold_out(num, fraction=0.02, seed=0, broken=()):
    """Holds out of `num` images; returns the numbers in (train, validation)."""
    items = [captions.Captioned(f"{i}.png", "c") for i in range(num)]

    def load(item):
        broke = int(item.file.removesuffix(".png")) in broken
        return dataset.Skip(item.file, "broken") if broke else {}

    splits = writing.hold_out(items, load, fraction, seed)
    return [[int(item.file[:-4]) for item in split.items] for split in splits.values()]


def test_validation_images_stay_when_images_are_added():
    train, held_out = hold_out(190, 0.1)
    assert (len(train), len(held_out)) == (171, 19)
    assert sorted(train + held_out) == list(range(190))
    _, more = hold_out(200, 0.1)
    assert len(set(held_out) & set(more)) >= 17
    assert held_out != hold_out(190, 0.1, seed=1)[1]


def test_held_out_images_are_usable_and_enough_for_a_grid(capsys):
    _, before = hold_out(100)
    assert len(before) == writing.GRID == 16
    broken = before[:5]
    train, held_out = hold_out(100, broken=broken)
    assert len(held_out) == 16 and set(before) - set(held_out) == set(broken) <= set(train)
    assert hold_out(100, 0.0)[1] == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("num", "broken", "held_out"), [(31, (), 15), (2, (), 1), (1, (), 0)])
def test_a_folder_too_small_for_a_grid_says_so(capsys, num, broken, held_out):
    assert len(hold_out(num, broken=broken)[1]) == held_out
    message = f"holding out only {held_out} of {num} examples: a grid of 16 samples takes 32"
    assert message in capsys.readouterr().err


def test_small_images_are_skipped_or_enlarged_and_counted(tmp_path, capsys):
    images = tmp_path / "images"
    for name, size in {"large": (70, 64), "wide": (90, 63), "tiny": (20, 20)}.items():
        save(images / f"{name}.png", size=size)
        (images / f"{name}.txt").write_text("caption")
    _, report = build(tmp_path / "skip", images, resolution=64, min_size=None)
    assert [s["name"] for s in report["skipped"]] == ["tiny.png", "wide.png"]
    assert "skipped 2: smaller than --resolution=64 2" in capsys.readouterr().err
    _, report = build(tmp_path / "enlarge", images, resolution=64, min_size=32)
    assert [(c["name"], c["detail"]) for c in report["changed"]] == [("wide.png", "90x63")]
    summary = capsys.readouterr().err
    assert "changed 1: enlarged to --resolution=64 1" in summary
    assert "skipped 1: smaller than --min_size=32 1" in summary


def test_truncates_captions_between_words(tmp_path):
    images = tmp_path / "images"
    for name, caption in {"a": "word " * 20, "b": "x" * 60, "c": "ä" * 60}.items():
        save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(caption, encoding="utf-8")
    _, report = build(tmp_path, images, truncate_captions=True)
    stored = [row["caption"].decode() for row in read(tmp_path).values()]
    assert stored == [" ".join(["word"] * 8), "x" * 39, "ä" * 19]
    assert [(c["name"], c["reason"]) for c in report["changed"]] == [
        (f"{name}.png", "caption truncated") for name in "abc"
    ]


def test_a_changed_folder_is_refused(tmp_path):
    images = tmp_path / "images"
    save(images / "a.png")
    (images / "a.txt").write_text("one")
    path, _ = build(tmp_path, images)
    assert build(tmp_path, images)[0] == path
    (images / "a.txt").write_text("two")
    with pytest.raises(UserError, match="was prepared with images=1 images"):
        build(tmp_path, images)


def test_categories_are_refused_for_images_without(tmp_path):
    save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("one")
    build(tmp_path, tmp_path / "images")
    source = tasks.RecordsSource("folder", str(tmp_path), categories=("Colors",))
    with pytest.raises(UserError, match="'folder' have no categories; set --config"):
        source.get_dataset("train")


@pytest.mark.parametrize("stage", ["base", "sr"])
def test_the_config_for_folders_needs_no_overrides(tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)  # there are no data here
    config = parse(load_config("folder", stage))
    with pytest.raises(UserError, match=r"data_pipelines.folder --images=FOLDER --data_dir=data$"):
        check.check_prepared(config)
    # Prepared by that command, with the defaults of its other flags, the data fit the config.
    images = tmp_path / "images"
    for i in range(4):
        save(images / f"{i}.png", size=(256, 256))
        (images / f"{i}.txt").write_text(f"number {i}")
    encoder = ByteEncoder("byte-tiny")
    encoder.identity |= {"dim": 128, "max_tokens": 192}
    writing.prepare(folder.Folder(data_dir="data", images=str(images), encoder=encoder))
    check.check_prepared(config)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has no image with a usable caption: nothing"),
        ({"a.txt": b"caption"}, "usable caption: caption without an image 1"),
        ({"a.png": b"no image", "a.txt": b"caption"}, "no usable example.*unreadable image 1"),
        ({"captions.csv": b"photo;text\n"}, "captions.csv: its first line names.*file_name"),
        (None, "--images=.* is not a folder"),
    ],
)
def test_a_folder_without_a_usable_image_is_refused_in_one_line(tmp_path, files, message):
    images = tmp_path / "images"
    if files is not None:
        images.mkdir()
        for name, content in files.items():
            (images / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        build(tmp_path, images)
    assert "\n" not in str(error.value)


COMMANDS = ("folder", "emoji", "scenes.__main__", "scenes.measure")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_slow_import(command):
    slow = {"jax", "tensorflow", "skimage"}
    code = f"import sys, data_pipelines.{command}; print({slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
