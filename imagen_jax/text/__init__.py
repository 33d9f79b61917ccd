"""Frozen text encoders: captions in, embeddings out, never trained with the diffusion models."""

from imagen_jax.text.encoder import TextEncoder, load_encoder

__all__ = ["TextEncoder", "load_encoder"]
