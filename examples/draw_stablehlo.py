"""Draws prompts with an exported sampler. Needs JAX and NumPy only, not imagen_jax.

    python -m imagen_jax.export --workdir=runs/demo --format=stablehlo --out=exports/hlo \
        --prompts="a red circle;two blue stars"
    python examples/draw_stablehlo.py exports/hlo images.ppm

The prompts are those that the export embedded. A super-resolution stage takes a third argument, the
.npy that this script wrote next to the image for the stage before.
"""

import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import export

DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a file: the header's length, a header in JSON, then the numbers."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, fields in header.items():
        begin, _ = fields["data_offsets"]
        count = math.prod(fields["shape"])
        values = np.frombuffer(data, DTYPES[fields["dtype"]], count, start + begin)
        tensors[name] = values.reshape(fields["shape"])
    return tensors


def draw(folder: Path, seed: int = 0, low_res: np.ndarray | None = None) -> np.ndarray:
    """Samples the embedded prompts; returns uint8 [prompts, height, width, 3].

    Args:
      folder: one stage of an export.
      low_res: for super-resolution, the images to enlarge, uint8.
    """
    sample = export.deserialize((folder / "sample.stablehlo").read_bytes())
    with np.load(folder / "prompts.npz") as prompts:
        inputs = {"text": prompts["text"], "text_mask": prompts["text_mask"]}
    inputs["seeds"] = seed + np.arange(len(inputs["text"]), dtype=np.uint32)
    if low_res is not None:
        inputs["low_res"] = low_res
    images = sample.call(read_safetensors(folder / "model.safetensors"), inputs)
    return np.clip(np.round((np.asarray(images) + 1) * 127.5), 0, 255).astype(np.uint8)


def main() -> None:
    """Draws and writes a row of images, as a picture and as an array."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    low_res = np.load(sys.argv[3]) if len(sys.argv) > 3 else None
    images = draw(folder, low_res=low_res)
    row = np.concatenate(images, axis=1)
    out.write_bytes(b"P6 %d %d 255\n" % (row.shape[1], row.shape[0]) + row.tobytes())
    np.save(out.with_suffix(".npy"), images)
    print(out)


if __name__ == "__main__":
    main()
