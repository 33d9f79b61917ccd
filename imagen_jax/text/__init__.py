"""Frozen text encoders: captions in, embeddings out, never trained with the diffusion models."""

from imagen_jax.text.encoder import TextEncoder, encoder_identity, load_encoder

__all__ = ["TextEncoder", "encoder_identity", "load_encoder"]
