"""Our TFRecord files are those of TensorFlow."""

import io

import pytest
import tensorflow as tf

from data_pipelines.records import tfrecord
from imagen_jax.common.errors import UserError

VALUES = {"id": "größer", "image": b"\0\xff", "captions": ["a", "b"], "tokens": 7, "none": ""}


def test_tensorflow_reads_what_we_write(tmp_path):
    records = [tfrecord.encode(VALUES), b"", b"x" * 100_000]
    (tmp_path / "x").write_bytes(b"".join(map(tfrecord.frame, records)))
    found = list(tf.data.TFRecordDataset(str(tmp_path / "x")).as_numpy_iterator())
    assert found == records
    features = tf.train.Example.FromString(found[0]).features.feature
    assert features["id"].bytes_list.value == ["größer".encode()]
    assert features["captions"].bytes_list.value == [b"a", b"b"]
    assert features["tokens"].int64_list.value == [7]


def test_we_read_what_tensorflow_writes(tmp_path):
    example = tf.train.Example()
    example.features.feature["captions"].bytes_list.value.extend([b"a", b"b"])
    example.features.feature["tokens"].int64_list.value.append(7)
    with tf.io.TFRecordWriter(str(tmp_path / "x")) as writer:
        for data in (example.SerializeToString(), b"two"):
            writer.write(data)
    with (tmp_path / "x").open("rb") as file:
        frames = list(tfrecord.read_frames(file, "x"))
    assert tfrecord.decode(tfrecord.data_of(frames[0])) == {"captions": [b"a", b"b"], "tokens": [7]}
    assert tfrecord.data_of(frames[1]) == b"two"
    assert b"".join(frames) == (tmp_path / "x").read_bytes()


def test_equal_values_give_equal_bytes():
    backwards = dict(reversed(VALUES.items()))
    assert tfrecord.encode(VALUES) == tfrecord.encode(backwards)


@pytest.mark.parametrize("at", [0, 9, 14, 30, -1])
def test_damage_is_noticed(at):
    whole = tfrecord.frame(b"x" * 20) * 2
    broken = bytearray(whole)
    broken[at] ^= 1
    for data in (bytes(broken), whole[:-1], whole[:50], whole[:40]):
        with pytest.raises(UserError, match="f: damaged: a record"):
            list(tfrecord.read_frames(io.BytesIO(data), "f"))
