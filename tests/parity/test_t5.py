"""T5's position buckets match Hugging Face's."""

from __future__ import annotations

import numpy as np
import pytest

from imagen_jax.text.t5 import relative_position_bucket

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 64), (64, 256)])
def test_position_buckets_match(bidirectional, num_buckets, max_distance):
    offsets = np.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(offsets), bidirectional, num_buckets, max_distance
    )
    found = relative_position_bucket(
        offsets, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    np.testing.assert_array_equal(found, expected.numpy())
