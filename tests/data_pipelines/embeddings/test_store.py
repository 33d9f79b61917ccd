"""The embedding store: lookup by caption, number formats, training on it, and its errors."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from conftest import FakeEncoder, load_config, shrink

from data_pipelines.common import caption_key
from data_pipelines.embeddings import caption_lists, encoding
from data_pipelines.embeddings.shards import finish
from data_pipelines.embeddings.store import (
    FORMS,
    check_identity,
    create_store,
    open_store,
)
from data_pipelines.reading.reader import Reader
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.text import encoder_identity
from imagen_jax.text.encoder import Batch


class Encoder(FakeEncoder):
    """The fake encoder of the tiny dataset, one caption per batch."""

    def batches(self, captions):
        for caption in captions:
            yield Batch(dict(zip([caption], self.encode([caption]), strict=True)), 8)


def make(path, data_dir, dtype="bfloat16", captions=None):
    rows = list(caption_lists.read_dataset(data_dir, "scenes/32"))
    rows = rows if captions is None else rows[:captions]
    store = create_store(str(path), Encoder().identity, dtype, 3)
    encoding.encode(store, encoding.assign(store, rows, 0, 1), Encoder())
    finish(store)
    return str(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_data):
    path = tmp_path_factory.mktemp("stores")
    return {dtype: make(path / dtype, tiny_data, dtype) for dtype in FORMS}


def config(tiny_data, store="", **text):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(dir=tiny_data, build=False, embeddings=store)
    values["text"].update(text)
    return parse(values)


def random_embedding(tokens, dim=16):
    rng = np.random.default_rng(tokens)
    return rng.normal(size=(tokens, dim)).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", FORMS)
def test_forms_keep_shapes_zeros_and_signs(dtype):
    form = FORMS[dtype]
    embedding = random_embedding(5)
    embedding[2] = 0
    embedding[3] *= 1e-4
    packed = form.pack(embedding)
    assert len(packed) == 5 * form.token_bytes(16)
    unpacked = form.unpack(packed, 16)
    assert unpacked.dtype == ml_dtypes.bfloat16 and unpacked.shape == (5, 16)
    assert not unpacked[2].any()
    error = np.abs(unpacked.astype(np.float32) - embedding.astype(np.float32)).max(axis=1)
    largest = np.abs(embedding.astype(np.float32)).max(axis=1)
    # Half a step of int8, plus the rounding of bfloat16.
    assert (error <= largest * (0 if dtype == "bfloat16" else 0.5 / 127 + 2**-8)).all()


def test_lookup_finds_stored_captions_only(stores, tiny_data):
    store = open_store(stores["bfloat16"])
    captions = [row.caption for row in caption_lists.read_dataset(tiny_data, "scenes/32")]
    found = [store.find(caption_key(caption)) for caption in captions]
    assert {shard for shard, _, _ in found} == {0, 1, 2}
    assert [tokens for _, _, tokens in found] == [Encoder().num_tokens(c) for c in captions]
    for caption in ("not there", "nor this", ""):
        assert store.find(caption_key(caption)) is None


def test_a_store_gives_the_same_batches_as_the_records(stores, tiny_data):
    of_records = next(Reader(config(tiny_data)).train_batches(24))
    of_store = next(Reader(config(tiny_data, stores["bfloat16"])).train_batches(24))
    for key, expected in of_records.items():
        np.testing.assert_array_equal(of_store[key], expected)
    rounded = next(Reader(config(tiny_data, stores["int8"])).train_batches(24))
    np.testing.assert_array_equal(rounded["text_mask"], of_records["text_mask"])
    a, b = (batch["text"].astype(np.float32) for batch in (rounded, of_records))
    assert 0 < np.abs(a - b).max() < 0.05
    [example] = Reader(config(tiny_data, stores["bfloat16"])).examples("heldout", 1)
    assert example["caption"] and example["text"].shape == (6, 8)


def test_a_missing_caption_is_a_one_line_error(tmp_path, tiny_data):
    lacking = config(tiny_data, make(tmp_path / "store", tiny_data, captions=8))
    with pytest.raises(UserError) as error:
        next(Reader(lacking).train_batches(0))
    message = str(error.value)
    assert "config.data.max_bad_share is 0.01, but of " in message and "\n" not in message
    assert "no embedding of the caption" in message
    assert f"{tmp_path / 'store'} lacks '" in message


def test_a_missing_or_damaged_store_is_a_one_line_error(tmp_path, stores, tiny_data):
    with pytest.raises(UserError, match="nowhere holds no store; make it with: python -m"):
        Reader(config(tiny_data, str(tmp_path / "nowhere")))
    for damage, words in (
        (lambda path: (path / "store.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "store.json").write_text("{}"), "damaged"),
        (lambda path: next(path.glob("shard*.json")).unlink(), "of its 3 shards"),
        (lambda path: next(path.glob("*.npy")).write_bytes(b"x"), "missing or damaged"),
        (lambda path: next(path.glob("*.npy")).unlink(), "missing or damaged"),
        (lambda path: [f.write_bytes(b"") for f in path.glob("*.tfrecord")], "damaged store"),
    ):
        path = tmp_path / "damaged"
        shutil.copytree(stores["bfloat16"], path)
        damage(path)
        with pytest.raises(UserError, match=words) as error:
            next(Reader(config(tiny_data, str(path))).train_batches(0))
        assert "\n" not in str(error.value)
        shutil.rmtree(path)


def identity(**changes):
    return {**encoder_identity("byte-tiny", 64), **changes}


def check(stored, encoder="byte-tiny", dim=128, max_tokens=64):
    check_identity(stored, encoder, dim, max_tokens, "data.embeddings=there")


def test_embeddings_of_the_configured_encoder_are_accepted():
    check(identity())
    check(identity(max_tokens=60))
    # If the encoder is not on this machine, only name and width are compared.
    check(identity(encoder="t5-v1_1-xxl", dim=4096), "/models/t5-v1_1-xxl", 4096)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights_sha256", "0" * 64),
        ("tokenizer_sha256", "1" * 64),
        ("tokenizer", "sentencepiece"),
        ("encoder", "t5-v1_1-xxl"),
        ("dim", 64),
        ("max_tokens", 65),
    ],
)
def test_a_store_of_another_encoder_is_refused_with_both_values(key, value):
    with pytest.raises(UserError, match=r"data\.embeddings=there") as error:
        check(identity(**{key: value}))
    message = str(error.value)
    assert str(value) in message and str(identity()[key]) in message and "\n" not in message


def test_a_name_from_a_model_hub_is_not_a_folder():
    with pytest.raises(UserError) as error:
        check(identity(), "google/t5-v1_1-base", 768)
    message = str(error.value)
    assert message.startswith("config.text.encoder is 'google/t5-v1_1-base' and is not a folder")
    assert "nothing is downloaded, see docs/text.md" in message and "'byte-tiny'" in message


def test_the_store_is_checked_instead_of_the_records(tmp_path, stores, tiny_data):
    shutil.copytree(stores["bfloat16"], tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "store.json").read_text())
    settings["weights_sha256"] = "2" * 64
    (tmp_path / "other" / "store.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"byte-tiny.*weights_sha256=[0-9a-f]{64}.*=2222"):
        Reader(config(tiny_data, str(tmp_path / "other")))
    wide = config(tiny_data, stores["bfloat16"], dim=16)
    with pytest.raises(UserError, match=r"config\.text\.dim is 16; .* data.embeddings=.* have 8"):
        Reader(wide)
