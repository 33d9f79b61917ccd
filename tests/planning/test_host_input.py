"""The input pipeline's rate in one line."""

import itertools

import numpy as np

from imagen_jax.planning.host_input import describe_rate


def test_a_rate_has_images_and_bytes_per_second():
    batches = itertools.repeat({"image": np.zeros((4, 8, 8, 3), np.uint8)})
    words = describe_rate(batches, seconds=0.01).replace(",", "").split()
    images, megabytes = float(words[0]), float(words[2])
    assert words[1] == "images/s" and words[3:5] == ["MB/s", "padded;"]
    assert words[6:9] == ["images/s", "per", "core"]
    assert abs(float(words[5]) * int(words[-1]) - images) <= 0.1 * int(words[-1])
    assert abs(megabytes - images * 192 / 1e6) < 0.06  # one decimal each
