"""TFRecord files of tf.Example records, written and read without TensorFlow.

Workers start in a second this way. Importing TensorFlow takes ten.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import google_crc32c
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from imagen_jax.common.errors import UserError

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER = _LENGTH.size + _CRC.size  # the length of the data and its checksum
FRAME = _HEADER + _CRC.size  # bytes that a record takes beyond its data

Values = Mapping[str, str | bytes | int | Sequence[str] | Sequence[bytes]]


def encode(values: Values) -> bytes:
    """Serializes a tf.Example; equal values give equal bytes."""
    features = {name: _feature(value) for name, value in sorted(values.items())}
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def decode(data: bytes) -> dict[str, list[bytes] | list[int]]:
    """Parses a tf.Example of strings and integers."""
    features = tf_example_pb2.Example.FromString(data).features.feature
    return {
        name: list(feature.bytes_list.value or feature.int64_list.value)
        for name, feature in features.items()
    }


def frame(data: bytes) -> bytes:
    """Returns a record as it appears in a file: its length and data, each with a checksum."""
    length = _LENGTH.pack(len(data))
    return b"".join((length, _checksum(length), data, _checksum(data)))


def read_frames(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yields the frames of a file.

    Raises:
      UserError: the file is cut short or damaged.
    """
    while header := file.read(_HEADER):
        length = header[: _LENGTH.size]
        if len(header) < _HEADER or _checksum(length) != header[_LENGTH.size :]:
            raise UserError(f"{name}: damaged: a record has no valid header")
        rest = file.read(_LENGTH.unpack(length)[0] + _CRC.size)
        data, crc = rest[: -_CRC.size], rest[-_CRC.size :]
        if len(rest) < _LENGTH.unpack(length)[0] + _CRC.size or _checksum(data) != crc:
            raise UserError(f"{name}: damaged: a record is cut short or has a wrong checksum")
        yield header + rest


def data_of(framed: bytes) -> bytes:
    """Returns the data in a frame."""
    return framed[_HEADER : -_CRC.size]


def _feature(value) -> tf_feature_pb2.Feature:
    values = [value] if isinstance(value, (str, bytes, int)) else value
    if isinstance(value, int):
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
    encoded = [v.encode() if isinstance(v, str) else v for v in values]
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=encoded))


def _checksum(data: bytes) -> bytes:
    """Returns the masked CRC-32C of the TFRecord format."""
    crc = google_crc32c.value(data)
    return _CRC.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
