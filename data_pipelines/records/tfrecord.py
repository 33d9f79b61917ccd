"""TFRecord files of tf.Example records, written and read without TensorFlow.

Workers start in a second this way. Importing TensorFlow takes ten. The classes of tf.Example are
imported when a record is encoded or decoded, because commands import this module for --help.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

import google_crc32c

from imagen_jax.common.errors import UserError

if TYPE_CHECKING:
    from tensorflow_datasets.proto import tf_feature_pb2

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
HEADER = _LENGTH.size + _CRC.size  # the length of the data and its checksum
FRAME = HEADER + _CRC.size  # bytes that a record takes beyond its data

Values = Mapping[str, str | bytes | int | Sequence[str] | Sequence[bytes]]


def encode(values: Values) -> bytes:
    """Serializes a tf.Example; equal values give equal bytes."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    features = {name: _feature(value) for name, value in sorted(values.items())}
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def features_of(data: bytes) -> Mapping[str, tf_feature_pb2.Feature]:
    """Parses a tf.Example; values are copied only when they are read."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(data).features.feature


def decode(data: bytes) -> dict[str, list[bytes] | list[int]]:
    """Parses a tf.Example of strings and integers."""
    return {
        name: list(feature.bytes_list.value or feature.int64_list.value)
        for name, feature in features_of(data).items()
    }


def frame(data: bytes) -> bytes:
    """Returns a record as it appears in a file: its length and data, each with a checksum."""
    length = _LENGTH.pack(len(data))
    return b"".join((length, checksum(length), data, checksum(data)))


def read_frames(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yields the frames of a file, from where it is.

    Raises:
      UserError: the file is cut short or damaged.
    """
    here = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(here)
    while header := file.read(HEADER):
        if not is_header(header):
            raise UserError(f"{name}: damaged: a record has no valid header")
        size = length_of(header) + _CRC.size
        rest = file.read(min(size, end))
        if len(rest) < size or checksum(rest[: -_CRC.size]) != rest[-_CRC.size :]:
            raise UserError(f"{name}: damaged: a record is cut short or has a wrong checksum")
        yield header + rest


def is_header(header: bytes) -> bool:
    """Returns whether the bytes are the header of a frame, by its checksum."""
    whole = len(header) == HEADER
    return whole and checksum(header[: _LENGTH.size]) == header[_LENGTH.size :]


def length_of(header: bytes) -> int:
    """Returns the length of the data that the header of a frame states."""
    return _LENGTH.unpack_from(header)[0]


def data_of(framed: bytes) -> bytes:
    """Returns the data in a frame."""
    return framed[HEADER : -_CRC.size]


def is_intact(framed: bytes) -> bool:
    """Returns whether the data in a frame have the frame's checksum."""
    return checksum(data_of(framed)) == framed[-_CRC.size :]


def _feature(value) -> tf_feature_pb2.Feature:
    from tensorflow_datasets.proto import tf_feature_pb2

    values = [value] if isinstance(value, (str, bytes, int)) else value
    if isinstance(value, int):
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
    encoded = [v.encode() if isinstance(v, str) else v for v in values]
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=encoded))


def checksum(data: bytes) -> bytes:
    """Returns the masked CRC-32C of the TFRecord format."""
    crc = google_crc32c.value(data)
    return _CRC.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
