"""Imagen in JAX: a text-to-image diffusion cascade trained on TPU pods, one GPU or a laptop.

pipe = imagen_jax.load()  # the released model; imagen_jax.load("runs/demo") loads a run
images = pipe(["a red circle"], guidance=3, seed=0)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagen_jax.pipeline.cascade import Cascade

__version__ = "0.1.0"

# Buckets are read and written through fsspec's gcsfs and s3fs, not through TensorFlow, and listed
# again each time: TensorStore writes checkpoints without them. gcsfs needs no special requests for
# buckets with folders.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def load(
    *workdirs: str | os.PathLike,
    step: int | None = None,
    ema: float | Sequence[float] | None = None,
) -> Cascade:
    """Loads trained runs or exported models as a pipeline from prompts to images; see docs/api.md.

    Args:
      workdirs: a run, or the runs of a cascade in order; a folder of imagen_jax.export does too
        (default: the model that ships with the package, which draws scenes).
      step: checkpoint step to load (default: the newest of each run).
      ema: width of the weights' average to rebuild from each run's snapshots, or one width per run
        (default: the EMA that training keeps).

    Raises:
      UserError: a workdir holds no run or no such checkpoint, or the runs do not form a cascade.
    """
    # Here, because JAX takes seconds to import.
    from imagen_jax.pipeline import cascade

    return cascade.load(*workdirs, step=step, ema=ema)
