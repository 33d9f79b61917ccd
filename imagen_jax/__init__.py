"""Imagen in JAX: a text-to-image diffusion cascade trained on TPU pods, one GPU or a laptop."""

__version__ = "0.1.0"
