"""What a run reads: mixtures, windows, bad records, captions, crops; on any number of hosts."""

import itertools
import json

import numpy as np
import pytest
from conftest import FakeEncoder, load_config, shrink
from datasets import record, write, write_store

from data_pipelines.reading.reader import Reader
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion.loss import bucket_names
from imagen_jax.training.metrics import MetricLogger


def read(data_dir, task="first", **changes):
    values = shrink(load_config("demo", "unet")).to_dict()
    values.update(batch_size=12, eval_every=0, sample_every=0)
    values["data"].update(dir=str(data_dir), build=False, task=task)
    for key, value in changes.items():
        (values["model"] if key == "image_size" else values["data"])[key] = value
    return parse(values)


def take(batches, n):
    found = list(itertools.islice(batches, n))
    batches.close()
    return found


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def ids(config, position, num):
    return [example.record.id for example in Reader(config).training_examples(position, num)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write(path, "first", [record(i, "a") for i in range(50)])
    write(path, "second", [record(100 + i, "b") for i in range(21)], offsets=False)
    return path


MIXED = {"task": "mixture", "mixture": {"first": 0.7, "second": 0.3}}


@pytest.mark.parametrize("window", [0, 32])
def test_a_mixture_loses_and_repeats_nothing_when_the_hosts_change(data_dir, window):
    config = read(data_dir, **MIXED, shuffle_window=window)
    stream = ids(config, 0, 240)
    for prefix, num in (("a", 50), ("b", 21)):
        mine = [name for name in stream if name[0] == prefix]
        assert abs(len(mine) / 240 - {"a": 0.7, "b": 0.3}[prefix]) < 0.01
        epochs = [mine[i : i + num] for i in range(0, len(mine) - num + 1, num)]
        assert len(epochs) == 3 and all(len(set(epoch)) == num for epoch in epochs)
    # 1, 2, 3 and 4 hosts, five batches each; every number resumes where the last one stopped.
    pictures = {e.image.tobytes(): e.record.id for e in Reader(config).training_examples(0, 240)}
    seen = []
    for turn, hosts in enumerate((1, 2, 3, 4)):
        parts = [take(Reader(config).train_batches(60 * turn, h, hosts), 5) for h in range(hosts)]
        for batches in zip(*parts, strict=True):
            images = np.concatenate([batch["image"] for batch in batches])
            seen += [pictures[image.tobytes()] for image in images]
    assert seen == stream


def test_a_seqio_mixture_names_tasks_and_rates(data_dir):
    from data_pipelines.reading import tasks

    registry = tasks.seqio.MixtureRegistry
    tasks.seqio.TaskRegistry.add("first", tasks.RecordsSource("first"), output_features={})
    tasks.seqio.TaskRegistry.add("second", tasks.RecordsSource("second"), output_features={})
    registry.add("both", [("first", 0.7), ("second", 0.3)])
    try:
        assert ids(read(data_dir, "both"), 0, 60) == ids(read(data_dir, **MIXED), 0, 60)
    finally:
        registry.remove("both")


def test_a_window_reads_runs_with_one_read_each(data_dir):
    config = read(data_dir, shuffle_window=32)
    reader = Reader(config)
    [examples] = reader._open("train", shuffle=True)
    examples.keep_runs(12, 12)
    for index in examples.order.index(np.arange(48)).tolist():
        examples.example(index, 0, 0)
    assert examples.source.files.reads == 3  # 48 records, 16 to a run and to a file
    assert sorted(ids(config, 0, 50)) == sorted(ids(read(data_dir), 0, 50))


def test_bad_records_are_replaced_counted_and_listed(tmp_path, data_dir):
    records = [record(i, "a") for i in range(50)]
    records[3]["image"] = records[3]["image"][:100]
    records[20]["image"] = b"text"
    records[21] = record(0, "a", image=record(0)["image"], text_tokens=0, id=b"a21")
    del records[22]["text_tokens"]
    records[23]["image"] = []
    del records[30]["image"]
    write(tmp_path, "first", records)
    config, whole = read(tmp_path, max_bad_share=0.5), read(data_dir)
    reader = Reader(config)
    batches = take(reader.train_batches(0), 4)
    expected = take(Reader(whole).train_batches(0), 4)
    names = np.array(ids(whole, 0, 48)).reshape(4, 12)
    bad = {"a3", "a20", "a21", "a22", "a23", "a30"}
    for batch, good, row in zip(batches, expected, names, strict=True):
        for i, name in enumerate(row):
            equal = np.array_equal(batch["image"][i], good["image"][i])
            assert equal == (name not in bad), name
    counts, entries = reader.take_bad_records()
    assert {"image cannot be decoded", "missing image or caption"} <= set(counts)
    details = {e["id"]: f"{e['reason']}: {e['detail']}" for e in entries}
    assert details.get("a22", "damaged embedding: text_embeddings without text_tokens") == (
        "damaged embedding: text_embeddings without text_tokens"
    )
    assert bad & set(names.ravel()) <= {e["id"] for e in entries} <= bad
    assert all(e["task"] == "first" and e["reason"] for e in entries)
    # The same on several hosts and after a resumption.
    hosts = [take(Reader(config).train_batches(12, h, 3), 1)[0] for h in range(3)]
    joined = {k: np.concatenate([h[k] for h in hosts]) for k in hosts[0]}
    assert same(joined, batches[1])
    memory = take(Reader(read(tmp_path, max_bad_share=0.5, in_memory=True)).train_batches(0), 4)
    assert all(map(same, memory, batches))


def test_too_many_bad_records_stop_the_run(tmp_path):
    records = [record(i) for i in range(32)]
    for fields in records[::2]:
        fields["image"] = b""
    write(tmp_path, "first", records)
    with pytest.raises(UserError) as error:
        take(Reader(read(tmp_path)).train_batches(0), 4)
    assert "config.data.max_bad_share is 0.01, but of " in str(error.value)
    assert "these are bad: image cannot be decoded " in str(error.value)


def test_a_damaged_file_costs_only_its_records(tmp_path):
    folder = write(tmp_path, "first", [record(i) for i in range(64)])
    path = next(folder.glob("*train*00001-of*[0-9]"))
    path.write_bytes(path.read_bytes()[:20_000])
    next(folder.glob("*train*00002-of*[0-9]")).unlink()
    reader = Reader(read(tmp_path, max_bad_share=0.9))
    names = {e.record.id for e in reader.training_examples(0, 64)}
    assert {f"r{i}" for i in (*range(16), *range(48, 64))} <= names
    counts, entries = reader.take_bad_records()
    assert set(counts) == {"truncated file", "unreadable file"}
    assert all("first-train.tfrecord-0000" in e["id"] for e in entries)


def test_one_of_several_captions_is_drawn_an_epoch(tmp_path):
    captions = {i: [f"{i} {word}" for word in ("one", "two", "three")] for i in range(16)}
    records = [record(i, captions=c, embedded=False) for i, c in captions.items()]
    write(tmp_path, "first", records, embedded=False)
    with pytest.raises(UserError, match=r"hold no embeddings; make a store with: python -m"):
        Reader(read(tmp_path))
    store = write_store(tmp_path / "store", itertools.chain(*captions.values()))
    reader = Reader(read(tmp_path, embeddings=store))
    examples = reader.training_examples(0, 16 * 6)
    drawn = {(e.record.id, n // 16): e.caption for n, e in enumerate(examples)}
    assert all(caption in captions[int(name[1:])] for (name, _), caption in drawn.items())
    assert len({drawn["r0", epoch] for epoch in range(6)}) > 1
    assert {c.split()[1] for c in drawn.values()} == {"one", "two", "three"}
    again = [e.caption for e in reader.training_examples(20, 40)]
    assert again == [e.caption for e in examples[20:60]]
    for e in examples[:5]:
        np.testing.assert_array_equal(e.texts[0], FakeEncoder().encode([e.caption])[0])
    first = Reader(read(tmp_path, embeddings=store)).examples("validation", 3)
    assert [row["caption"] for row in first] == ["0 one", "1 one", "2 one"]


NAMED = ["caption", "caption", "rewritten"]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """16 images with two original captions and, except the last, a rewritten one; and a store."""
    path, records, captions = tmp_path_factory.mktemp("named"), [], []
    for i in range(16):
        words = [f"{i} old", f"{i} older", f"{i} new"][: 2 if i == 15 else 3]
        sources = [name.encode() for name in NAMED[: len(words)]]
        records.append(record(i, captions=words, embedded=False, caption_sources=sources))
        captions += words
    write(path, "first", records, embedded=False)
    return path, write_store(path / "store", captions)


def test_captions_are_drawn_by_the_weights_of_their_names(named):
    path, store = named
    config = read(path, embeddings=store, caption_weights={"caption": 0.3, "rewritten": 0.7})
    epochs = 200
    examples = Reader(config).training_examples(0, 16 * epochs)
    several = [e.caption.split()[1] for e in examples if e.record.id != "r15"]
    num = len(several)
    # A share lies within 5 standard deviations of its probability, but once in a million tests.
    for word, p in (("new", 0.7), ("old", 0.15), ("older", 0.15)):
        assert abs(several.count(word) / num - p) < 5 * (p * (1 - p) / num) ** 0.5
    # One record's draws are independent of one another, and of another record's.
    draws = {
        n: [e.caption.split()[1] == "new" for e in examples if e.record.id == n]
        for n in ("r0", "r1")
    }
    deviation = (0.7 * 0.3 / epochs) ** 0.5
    assert all(abs(np.mean(drawn) - 0.7) < 5 * deviation for drawn in draws.values())
    both = np.mean(np.logical_and(*draws.values()))
    assert abs(both - 0.49) < 5 * (0.49 * 0.51 / epochs) ** 0.5
    # An image without a rewritten caption has only original ones.
    assert {e.caption for e in examples if e.record.id == "r15"} == {"15 old", "15 older"}
    again = Reader(config).training_examples(1000, 60)
    assert [e.caption for e in again] == [e.caption for e in examples[1000:1060]]
    for e in again[:20]:  # the embedding is the drawn caption's
        np.testing.assert_array_equal(e.texts[0], FakeEncoder().encode([e.caption])[0])


def test_names_without_a_weight_are_never_drawn(named):
    path, store = named
    only = read(path, embeddings=store, max_bad_share=0.5, caption_weights={"rewritten": 1.0})
    reader = Reader(only)
    captions = {e.caption.split()[1] for e in reader.training_examples(0, 64)}
    assert captions == {"new"}
    assert reader.examples("validation", 2)[1]["caption"] == "1 new"
    counts, entries = reader.take_bad_records()
    assert set(counts) == {"no caption of data.caption_weights"}
    assert {e["id"] for e in entries} == {"r15"}


def test_unknown_names_of_captions_are_refused(named, data_dir):
    path, store = named
    features = path / "first/1.0.0/features.json"
    weights = {"caption": 0.5, "rewriten": 0.5}
    config = read(path, embeddings=store, caption_weights=weights)
    features.write_text("{}")
    with pytest.raises(UserError, match=r"caption_weights has 'caption'; .* have no names; recapt"):
        Reader(config)
    manifest = features.with_name("manifest.json")
    manifest.write_text(json.dumps({"captions": {"sources": {"caption": 2, "rewritten": 1}}}))
    words = r"has 'rewriten'; the captions of data\.task=first in .* are named: caption, rewritten"
    with pytest.raises(UserError, match=words):
        Reader(config)
    manifest.unlink()
    features.unlink()


def test_random_crops_and_flips_are_part_of_the_example(data_dir):
    plain = read(data_dir)
    flipped = read(data_dir, flip=True)
    a, b = (take(Reader(c).train_batches(0), 2)[1]["image"] for c in (plain, flipped))
    mirrored = [np.array_equal(y, x[:, ::-1]) for x, y in zip(a, b, strict=True)]
    equal = [np.array_equal(x, y) for x, y in zip(a, b, strict=True)]
    assert any(mirrored) and any(equal) and all(np.add(mirrored, equal))
    random = Reader(read(data_dir, crop="random", min_crop_scale=0.5, image_size=16))
    center = Reader(read(data_dir, image_size=16))
    crops, again = (random.training_examples(0, 50) for _ in range(2))
    assert all(np.array_equal(x.image, y.image) for x, y in zip(crops, again, strict=True))
    middle = center.training_examples(0, 50)
    pairs = zip(crops, middle, strict=True)
    assert sum(not np.array_equal(x.image, y.image) for x, y in pairs) > 40
    # Evaluation takes the center.
    held_out = [r.examples("validation", 3)[2]["image"] for r in (random, center)]
    np.testing.assert_array_equal(*held_out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixture": {"first": 1}}, r"data\.mixture is .*allowed: names with data.task='mixture'"),
        ({"task": "mixture"}, r"data\.mixture is \{\}; allowed: names with"),
        ({"task": "mixture", "mixture": {"first": 0}}, r"weights above 0"),
        ({"caption_weights": {"caption": 0}}, r"caption_weights is .* names of captions with weig"),
        ({"crop": "corner"}, r"data\.crop is 'corner'; allowed: center, random"),
        ({"min_crop_scale": 0.5}, r"data\.min_crop_scale is 0\.5; allowed: 1 with data\.crop="),
        ({"crop": "random", "min_crop_scale": 0.0}, r"min_crop_scale is 0\.0; allowed: above 0"),
        ({"crop": "random", "in_memory": True}, r"data\.in_memory is True; allowed: false with"),
        ({"shuffle_window": 100}, r"data\.shuffle_window is 100; allowed: 0, or a multiple of 16"),
        ({"max_bad_share": 1.0}, r"data\.max_bad_share is 1\.0; allowed: 0 or more, below 1"),
    ],
)
def test_bad_keys_are_refused(data_dir, changes, words):
    with pytest.raises(UserError, match=words):
        read(data_dir, **changes)


def test_an_unknown_task_of_a_mixture_is_refused(data_dir):
    config = read(data_dir, task="mixture", mixture={"first": 1.0, "third": 1.0})
    with pytest.raises(UserError, match=r"data\.task is 'third'; allowed: scenes_32, .*, mixture"):
        Reader(config)


def test_bad_records_and_the_wait_for_data_are_in_the_metrics(tmp_path):
    class Bad:
        def take_bad_records(self):
            return {"image too small": 2}, [{"id": "a", "reason": "image too small"}]

    logger = MetricLogger(tmp_path, 10, 12, 1.0, Bad())
    metrics = {"loss": 1.0, "grad_norm": 1.0, "skipped": np.array(False)}
    buckets = np.ones(len(bucket_names()))
    logger.add(metrics | {"bucket_loss": buckets, "bucket_count": buckets})
    with logger.waiting():
        sum(range(10**5))
    logger.flush(1)
    logger.close()
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["bad_records/image_too_small"] == 2 and 0 < line["data_wait"] < 1
    [entry] = map(json.loads, (tmp_path / "bad_records_0.jsonl").read_text().splitlines())
    assert entry == {"id": "a", "reason": "image too small"}
