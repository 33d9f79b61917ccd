"""The encoder and its loader against Hugging Face's T5EncoderModel, at random weights."""

from __future__ import annotations

import numpy as np
import pytest

from imagen_jax.text.hf_format import load_t5
from imagen_jax.text.t5 import relative_position_bucket

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import T5Config, T5EncoderModel  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

LENGTH = 150  # past the distance at which position buckets saturate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same random weights in both libraries, through a folder that Hugging Face wrote."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=4, vocab_size=100,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    theirs = T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms start at one, which would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return theirs, load_t5(folder)


@pytest.mark.parametrize("lengths", [[LENGTH] * 3, [LENGTH, 90, 1]], ids=["unpadded", "padded"])
def test_outputs_agree(models, lengths):
    theirs, ours = models
    ids = np.random.default_rng(0).integers(2, 100, (3, LENGTH))
    mask = np.arange(LENGTH)[None, :] < np.array(lengths)[:, None]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    np.testing.assert_allclose(ours(ids, mask)[mask], expected.numpy()[mask], atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 64), (64, 256)])
def test_position_buckets_agree(bidirectional, num_buckets, max_distance):
    offsets = np.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(offsets), bidirectional, num_buckets, max_distance
    )
    found = relative_position_bucket(
        offsets, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    np.testing.assert_array_equal(found, expected.numpy())
