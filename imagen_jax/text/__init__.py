"""Frozen text encoders: captions in, embeddings out. Diffusion training never updates them."""

from imagen_jax.text.encoder import TextEncoder, encoder_identity, load_encoder, load_token_limit

__all__ = ["TextEncoder", "encoder_identity", "load_encoder", "load_token_limit"]
