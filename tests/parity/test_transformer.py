"""A block of the transformer matches torch's normalization, attention and activation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagen_jax.models.token_layers import rotations
from imagen_jax.models.transformer import Block, Tokens, TransformerConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

B, SIDE, TEXT, D = 2, 3, 4, 8
CONFIG = TransformerConfig(
    width=32, depth=1, head_dim=D, mlp_ratio=2.0, text_tokens="keys", dtype="float32"
)


def test_a_block_matches_torch():
    graphdef, state = nnx.split(Block(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.float32(0.2 * rng.standard_normal(x.shape)), state)
    h, text, emb = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((B, SIDE**2, 32), (B, TEXT, 32), (B, 32))
    )
    lengths = np.array([2, 4])
    mask = np.arange(SIDE**2 + TEXT)[None, :] < SIDE**2 + lengths[:, None]
    rotation = np.asarray(rotations(SIDE, SIDE, D))
    tokens = Tokens(jnp.broadcast_to(rotation[None], (B, *rotation.shape)), text, mask)
    found = jax.jit(nnx.merge(graphdef, state).__call__)(h, tokens, emb, None)

    w = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), nnx.to_pure_dict(state))
    h, text, emb, mask = (torch.tensor(x) for x in (h, text, emb, mask))
    cos, sin = (torch.tensor(rotation[None, :, i]) for i in range(2))
    # Here the sign belongs to the sines; there it belongs to the rotated half.
    sin = torch.cat([-sin[..., : D // 2], sin[..., D // 2 :]], dim=-1)

    def linear(w, x):
        return F.linear(x, w["kernel"].T, w["bias"])

    def norm(w, x):
        return F.rms_norm(x, w["scale"].shape, w["scale"], eps=1e-6)

    def heads(x):
        return x.reshape(B, -1, 32 // D, D).transpose(1, 2)

    def attend(w, x):
        q, k = (norm(w[f"{n}_norm"], heads(linear(w[n], x))) for n in "qk")
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        text_k = norm(w["k_norm"], heads(linear(w["text_k"], text)))
        v = torch.cat([heads(linear(w["v"], x)), heads(linear(w["text_v"], text))], dim=2)
        keys = torch.cat([k, text_k], dim=2)
        out = F.scaled_dot_product_attention(q, keys, v, attn_mask=mask[:, None, None, :])
        return linear(w["out"], out.transpose(1, 2).reshape(B, -1, 32))

    parts = linear(w["modulation"]["linear"], F.silu(emb))[:, None].chunk(6, dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    h = h + gate1 * attend(w["attention"], norm(w["norm1"], h) * (1 + scale1) + shift1)
    x = norm(w["norm2"], h) * (1 + scale2) + shift2
    x = F.silu(linear(w["mlp"]["gate"], x)) * linear(w["mlp"]["up"], x)
    expected = (h + gate2 * linear(w["mlp"]["down"], x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - np.asarray(h)).max() > 0.1
