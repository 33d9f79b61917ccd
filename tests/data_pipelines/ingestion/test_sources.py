"""Each format becomes the same records: recognized by what is there, or named."""

import json
import os

import pyarrow as pa
import pytest
from making import encoded, ingest, jpeg, manifest, picture, report, rows, write_tar
from pyarrow import parquet

from data_pipelines.ingestion import sources
from data_pipelines.ingestion.items import Caption, Columns
from imagen_jax.common.errors import UserError


def read(spec, columns=None, part_size=100):
    """Lists and reads a source: the kind, {id: captions} and {name: reason} of what is skipped."""
    found = sources.find(str(spec), columns or Columns(), part_size)
    taken, skipped = {}, {skip.name: skip.reason for skip in found.skipped}
    for part in found.parts:
        for item in part.read():
            if hasattr(item, "image"):
                assert item.image and item.id not in taken
                taken[item.id] = [caption.text for caption in item.captions]
            else:
                skipped[item.name] = item.reason
    return found.kind, taken, skipped


def test_tars_of_img2dataset(tmp_path):
    write_tar(
        tmp_path / "00000.tar",
        {
            **{"a.jpg": jpeg(0), "a.txt": "from  the\ntext", "a.json": {"caption": "json"}},
            **{"b.webp": encoded(picture(1), "WEBP"), "b.json": {"caption": "only json"}},
            **{"c.png": encoded(picture(2)), "c.json": {"width": 5}},
            **{"d.txt": "no image"},
            **{"e.jpg": jpeg(3), "e.txt": " \n"},
            **{"f.0.jpg": jpeg(4), "f.1.jpg": jpeg(5), "f.txt": "two images"},
            **{"g.jpg": jpeg(6), "g.txt": b"\xff\xfe"},
            **{"h.jpg": jpeg(7), "h.txt": "fine", "h.json": "{oops"},
            **{"sub/i.jpg": jpeg(8), "sub/i.txt": "in a folder"},
            **{"../../escape.jpg": jpeg(9), "../../escape.txt": "outside"},
        },
    )
    write_tar(tmp_path / "more/00001.tar", {"a.jpg": jpeg(10), "a.txt": "same key, other tar"})
    (tmp_path / "00000.parquet").write_bytes(b"metadata that img2dataset leaves")
    kind, taken, skipped = read(tmp_path)
    assert kind == "webdataset"
    assert taken == {
        "00000/a": ["from the text"],
        "00000/b": ["only json"],
        "00000/f.0.jpg": ["two images"],
        "00000/f.1.jpg": ["two images"],
        "00000/h": ["fine"],
        "00000/sub/i": ["in a folder"],
        "00000/../../escape": ["outside"],  # only a name: nothing is unpacked
        "more/00001/a": ["same key, other tar"],
    }
    assert skipped == {
        "00000/c": "missing caption",
        "00000/d": "missing image",
        "00000/e": "empty caption",
        "00000/g": "caption not UTF-8",
        "00000/h": "unreadable json",
    }


def test_a_key_that_returns_in_a_tar_is_an_error_unless_damage_is_tolerated(tmp_path):
    files = {"a.jpg": jpeg(0), "a.txt": "first", "b.jpg": jpeg(1), "b.txt": "second"}
    write_tar(tmp_path / "x.tar", {**files, "a.png": encoded(picture(2))})
    _, taken, skipped = read(tmp_path / "x.tar")
    assert list(taken) == ["x/a", "x/b"] and skipped == {"x/a": "duplicate key"}
    with pytest.raises(UserError, match=r"x\.tar: the key of x/a occurs twice\. .*--skip_damaged"):
        ingest(tmp_path / "data", tmp_path / "x.tar")
    folder = ingest(tmp_path / "data", tmp_path / "x.tar", skip_damaged=True)
    assert {k: v["caption"] for k, v in rows(folder).items()} == {"x/a": b"first", "x/b": b"second"}
    assert report(folder)["skipped"] == [{"name": "x/a", "reason": "duplicate key", "detail": ""}]


def test_braces_and_stars_name_tars(tmp_path):
    for i in range(4):
        write_tar(tmp_path / f"{i:02d}.tar", {f"{i}.jpg": jpeg(i), f"{i}.txt": str(i)})
    assert list(read(f"{tmp_path}/{{01..02}}.tar")[1]) == ["01/1", "02/2"]
    assert len(read(f"webdataset:{tmp_path}/0*.tar")[1]) == 4
    with pytest.raises(UserError, match=r"04\.tar does not exist"):
        read(f"{tmp_path}/{{01..07}}.tar")


def test_parquet_of_laion_with_bytes_and_scores(tmp_path):
    table = {
        "jpg": [jpeg(i) for i in range(5)],
        "TEXT": ["one", None, " ", "four", "five"],
        "pwatermark": [0.1, 0.2, 0.3, None, 0.9],
        "LICENSE": ["?", "?", "?", "CC-BY", None],
    }
    parquet.write_table(pa.table(table), tmp_path / "part.parquet", row_group_size=2)
    for size in (1, 3, 100):  # parts cut through row groups
        kind, taken, skipped = read(tmp_path, part_size=size)
        assert kind == "parquet"
        assert taken == {f"part/000000{i}": [t] for i, t in ((0, "one"), (3, "four"), (4, "five"))}
        assert skipped == {"part/0000001": "missing caption", "part/0000002": "empty caption"}
    folder = ingest(tmp_path / "data", tmp_path / "part.parquet")
    counts = manifest(folder)["counts"]
    assert counts["rejected"]["pwatermark beyond --max_watermark=0.8"] == 1
    assert counts["scores"] == {"pwatermark": 1} and counts["unknown_license"] == 0


def test_parquet_of_hugging_face_and_of_paths(tmp_path):
    struct = [{"bytes": jpeg(0), "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]
    (tmp_path / "hf/data").mkdir(parents=True)
    (tmp_path / "hf/data/b.jpg").write_bytes(jpeg(1))
    table = pa.table({"image": struct, "text": [["one", "two"], ["three"]]})
    parquet.write_table(table, tmp_path / "hf/data/train-00000-of-00001.parquet")
    taken = read(f"parquet:{tmp_path}/hf", columns=Columns(captions=("text",)))[1]
    assert list(taken.values()) == [["one", "two"], ["three"]]

    (tmp_path / "pixels").mkdir()
    (tmp_path / "pixels/x.jpg").write_bytes(jpeg(2))
    table = pa.table({"image_path": ["x.jpg", "gone.jpg"], "caption": ["x", "y"]})
    parquet.write_table(table, tmp_path / "paths.parquet")
    columns = Columns(folder=str(tmp_path / "pixels"))
    _, taken, skipped = read(tmp_path / "paths.parquet", columns)
    assert list(taken.values()) == [["x"]] and list(skipped.values()) == ["missing image"]


def test_coco_with_several_captions(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    for i in (1, 2):
        (tmp_path / f"train2017/{i:012d}.jpg").write_bytes(jpeg(i))
    content = {
        "info": {},
        "licenses": [{"id": 4, "name": "CC BY", "url": "x"}],
        "images": [
            {"id": 9, "file_name": "000000000001.jpg", "license": 4},
            {"id": 5, "file_name": "000000000002.jpg"},
            {"id": 6, "file_name": "000000000003.jpg"},
        ],
        "annotations": [
            *({"id": i, "image_id": 9, "caption": f"caption {i}\n"} for i in range(5)),
            {"id": 7, "image_id": 5, "caption": "only one"},
            {"id": 8, "image_id": 77, "caption": "of no image"},
        ],
    }
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps(content))
    for spec in (tmp_path, tmp_path / "annotations/captions_train2017.json"):
        kind, taken, skipped = read(spec)
        assert kind == "coco"
        first = [f"caption {i}" for i in range(5)]
        assert taken == {"000000000001.jpg": first, "000000000002.jpg": ["only one"]}
        assert set(skipped.values()) == {"missing caption", "caption without an image"}
    found = rows(ingest(tmp_path / "data", tmp_path))
    assert [c.decode() for c in found["000000000001.jpg"]["captions"]] == first
    assert found["000000000001.jpg"]["caption"] == b"caption 0"
    assert found["000000000002.jpg"]["captions"].tolist() == [b"only one"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_hugging_face_image_folders(tmp_path, suffix):
    (tmp_path / "train").mkdir()
    entries = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(3)]
    for entry in entries[:2]:
        (tmp_path / "train" / entry["file_name"]).write_bytes(encoded(picture(len(entry["text"]))))
    path = tmp_path / f"train/metadata.{suffix}"
    if suffix in ("csv", "tsv"):
        delimiter = "," if suffix == "csv" else "\t"
        lines = [
            delimiter.join(entry.values())
            for entry in [dict.fromkeys(entries[0]), *entries]
            if all(entry.values())
        ]
        path.write_text("\n".join([delimiter.join(entries[0]), *lines]))
    elif suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(entries), path)
    elif suffix == "json":
        path.write_text(json.dumps(entries))
    else:
        path.write_text("\n".join(map(json.dumps, entries)))
    if suffix == "tsv":  # not a name that Hugging Face knows, so the list is the source
        kind, taken, skipped = read(path)
        assert (kind, list(taken)) == ("list", ["0.png", "1.png"])
    else:
        kind, taken, skipped = read(tmp_path)
        assert (kind, list(taken)) == ("folder", ["train/0.png", "train/1.png"])
    assert list(taken.values()) == [["number 0"], ["number 1"]]
    assert list(skipped.values()) == ["listed file missing"]


def test_precedence_in_a_folder(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.png", "deep/er/c.webp", "d.BMP", "e.jpeg")):
        picture(number).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("first  line\n\n second line\n")
    (tmp_path / "b.txt").write_text("loses to both lists")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": ["from jsonl", "again", "again"]}\n'
        '\n{"file_name": "deep/er/c.webp", "caption": "größer"}\n'
    )
    (tmp_path / "captions.csv").write_text('file_name,caption\nb.png,loses\nd.BMP,"one, two"\n')
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    _, taken, skipped = read(tmp_path)
    assert taken == {
        "a.jpg": ["first line", "second line"],
        "b.png": ["from jsonl", "again"],
        "d.BMP": ["one, two"],
        "deep/er/c.webp": ["größer"],
        "e.jpeg": ["with a mark"],
    }
    assert list(taken) == sorted(taken)
    assert skipped == {"captions.csv: b.png": "duplicate entry"}


def test_a_folder_lists_what_it_leaves_out(tmp_path):
    for number, name in enumerate(("good", "no", "empty", "latin")):
        picture(number).save(tmp_path / f"{name}.png")
    for name in ("good", "orphan"):
        (tmp_path / f"{name}.txt").write_text("fine")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "good.json").write_text('{"punsafe": 0.1}')
    (tmp_path / "movie.mp4").write_bytes(b"mp4")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "gone.png", "text": "x"}\n{oops\n[1]\n{"file_name": "good.png", "text": 3}\n'
        '{"file_name": "../outside.png", "text": "x"}\n'
    )
    _, taken, skipped = read(tmp_path)
    assert taken == {"good.png": ["fine"]}
    assert skipped == {
        "no.png": "missing caption",
        "empty.png": "empty caption",
        "latin.png": "caption not UTF-8",
        "orphan.txt": "caption without an image",
        "movie.mp4": "unsupported file type",
        "metadata.jsonl: gone.png": "listed file missing",
        "metadata.jsonl: ../outside.png": "listed file missing",
        "metadata.jsonl:2": "unreadable entry",
        "metadata.jsonl:3": "unreadable entry",
        "metadata.jsonl:4": "empty caption",
    }


def test_rows_of_one_image_add_up_and_columns_have_names(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(picture(0)))
    lines = ["image,raw,better", "x.png,one,two", "./x.png,three,two"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    columns = Columns(captions=("raw", "better"))
    found = sources.find(str(tmp_path / "list.csv"), columns, 10)
    [item] = found.parts[0].read()
    assert item.captions == tuple(
        Caption(*pair) for pair in (("one", "raw"), ("two", "better"), ("three", "raw"))
    )
    [row] = rows(ingest(tmp_path / "data", tmp_path / "list.csv", columns=columns)).values()
    assert row["caption_sources"].tolist() == [b"raw", b"better", b"raw"]


@pytest.mark.parametrize(
    ("files", "spec", "words"),
    [
        ({}, "gone", "gone does not exist"),
        ({}, "zip:here", "no kind 'zip'; allowed: webdataset, parquet, coco, folder, list"),
        ({"a.zip": b""}, "a.zip", "is a .zip file; supported: a folder, .csv"),
        ({"f/readme.md": b""}, "f", "no image with a caption, read as 'folder'; found: unsup"),
        ({"f/a.txt": b"caption"}, "f", "caption without an image 1"),
        ({"x.tar": b"not a tar" * 99}, "x.tar", "x.tar: damaged or cut short"),
        ({"x.parquet": b"PAR1"}, "x.parquet", "x.parquet: not a readable Parquet file"),
        ({"x.csv": b"photo;words\na;b\n"}, "x.csv", "it has: photo;words"),
        ({"x.csv": b""}, "x.csv", "x.csv: empty"),
        ({"x.jsonl": b'{"url": "u"}\n'}, "x.jsonl", "no row has an image and a caption"),
        ({"x.json": b'{"a": 1}'}, "x.json", "holds a dict; it must be a list"),
        ({"x.json": b'{"images": [], "x": 1}'}, "x.json", "not COCO captions (KeyError"),
        (
            {"x.json": b'{"images": [{"id": 1}], "annotations": []}'},
            "x.json",
            "(KeyError: 'file_na",
        ),
        (
            {
                "x.json": b'{"images": [{"id": 1, "file_name": "a"}], "annotations": '
                b'[{"image_id": 1, "caption": null}]}'
            },
            "x.json",
            "x.json: not COCO captions (AttributeError",
        ),
        (
            {"x.json": b'{"images": [{"id": 1, "file_name": "q.jpg"}], "annotations": []}'},
            "x.json",
            "its images are not in",
        ),
    ],
)
def test_bad_sources_are_refused_in_one_line(tmp_path, monkeypatch, files, spec, words):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(spec)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_parquet_columns_are_refused_in_one_line(tmp_path):
    def write(name, **columns):
        parquet.write_table(pa.table(columns), tmp_path / name)

    write("urls.parquet", URL=["http://x"], TEXT=["x"])
    with pytest.raises(UserError, match="'URL' has addresses: download them with img2dataset"):
        read(tmp_path / "urls.parquet")
    write("mute.parquet", image=[b"x"])
    with pytest.raises(UserError, match=r"no column TEXT or caption .*--caption_columns; the file"):
        read(tmp_path / "mute.parquet")
    write("set-a.parquet", image=[b"x"], caption=["x"])
    write("set-b.parquet", image=[b"x"], text=["x"])
    with pytest.raises(UserError, match=r"set-b.parquet has no column 'caption', which .*set-a"):
        read(f"{tmp_path}/set-*.parquet")
    write("kind-a.parquet", image=[b"x"], caption=["x"])
    write("kind-b.parquet", image=["x.jpg"], caption=["x"])
    words = r"kind-b.parquet: the column 'image' has text, but bytes in .*kind-a.parquet; the files"
    with pytest.raises(UserError, match=words):
        read(f"{tmp_path}/kind-*.parquet")
    write("number.parquet", image=[1], caption=["x"])
    words = (
        r"the column 'image' has int64, no images; allowed: bytes, text, structs\. .*image_column"
    )
    with pytest.raises(UserError, match=words):
        read(tmp_path / "number.parquet")
    write("count.parquet", image=[b"x"], caption=[1])
    with pytest.raises(UserError, match=r"'caption' has int64, no captions; .* --caption_columns"):
        read(tmp_path / "count.parquet")


def test_a_truncated_tar_stops_unless_damage_is_allowed(tmp_path):
    whole = {f"{i}.{s}": d for i in range(5) for s, d in (("jpg", jpeg(i)), ("txt", f"n {i}"))}
    write_tar(tmp_path / "t/x.tar", whole)
    data = (tmp_path / "t/x.tar").read_bytes()
    (tmp_path / "t/x.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"x\.tar: damaged or cut short: .* --skip_damaged"):
        ingest(tmp_path / "data", tmp_path / "t")
    folder = ingest(tmp_path / "data", tmp_path / "t", skip_damaged=True)
    assert 1 <= len(rows(folder)) < 5
    assert report(folder)["skipped"][-1]["reason"] == "damaged source"


def test_paths_and_links_out_of_the_folder_and_pipes_are_skipped_unless_allowed(tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("secret.jpg", "own/a.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    (tmp_path / "own/link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "own/inner.jpg").symlink_to(tmp_path / "own/a.jpg")
    (tmp_path / "own/dangling.jpg").symlink_to(tmp_path / "none.jpg")
    os.mkfifo(tmp_path / "own/pipe.jpg")
    names = ["a.jpg", "inner.jpg", "link.jpg", "../secret.jpg", str(tmp_path / "secret.jpg")]
    lines = [{"file_name": n, "text": n} for n in [*names, "dangling.jpg", "pipe.jpg", "nul\0.jpg"]]
    path = tmp_path / "own/list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, taken, skipped = read(path)
    assert list(taken) == ["a.jpg", "inner.jpg"]
    assert skipped == {
        **dict.fromkeys([*names[2:], "dangling.jpg"], "outside of the folder"),
        "pipe.jpg": "unreadable file",
        "list.jsonl:8": "unreadable entry",
    }
    _, taken, skipped = read(path, Columns(outside=True))
    assert list(taken) == names and skipped["dangling.jpg"] == "listed file missing"

    path.unlink()
    for name in ("a", "inner", "link", "pipe"):
        (tmp_path / f"own/{name}.txt").write_text(name)
    (tmp_path / "own/a.txt").unlink()
    (tmp_path / "own/a.txt").symlink_to(tmp_path / "secret.jpg")
    _, taken, skipped = read(tmp_path / "own")
    assert list(taken) == ["inner.jpg"]
    assert skipped["link.jpg"] == "outside of the folder"
    assert skipped["a.jpg"] == "missing caption", "its caption leads out of the folder"
