"""The models that ship with the package, exported by imagen_jax.export; each has a model card."""

from __future__ import annotations

from pathlib import Path

# The cascade that draws scenes at 256x256, from configs/scenes32.py and configs/scenes256.py.
SCENES = Path(__file__).parent / "scenes"
