"""Extracts features of images with a frozen network, on all devices of all hosts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from imagen_jax.common.errors import UserError
from imagen_jax.devices import sharding
from imagen_jax.evaluation.networks import clip
from imagen_jax.evaluation.networks.table import (
    FLAG,
    PILLOW_BICUBIC,
    TF1_BILINEAR,
    Network,
    find,
)
from imagen_jax.evaluation.networks.weights import Opened
from imagen_jax.text.tokenizer import load_tokenizer

ROWS = 32  # per device
REMEMBERED = 8  # sets of images whose features stay in memory
TOKENS = 77  # the longest caption that CLIP reads, including its start and end tokens

Row = dict[str, np.ndarray]


class Extractor:
    """Maps images to features. It remembers the features of the latest sets of images.

    Attributes:
      network: the published network.
      path: its file.
      sha256: the file's hash.
    """

    def __init__(self, network: Network, metric: str, folder: Path | None = None):
        """Finds and checks the network's file; the first call reads it.

        Args:
          metric: the metric that needs it, for messages.
          folder: the folder of weights.

        Raises:
          UserError: the file is missing, damaged, or has another network.
        """
        self.network = network
        self.path, self.sha256 = find(network, metric, folder)
        self._opened = network.open(self.path)
        self._program: _Program | None = None
        self._remembered: dict[str, np.ndarray] = {}

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Returns float32 [N, dim], equal in all processes.

        Args:
          images: uint8 [N, H, W, 3], for example an array. Of a lazy sequence, each process reads
            only the images of its own devices, batch by batch.

        Raises:
          UserError: the images have different sizes.
        """
        key = content_sha256(images)
        if key not in self._remembered:
            if self._program is None:
                self._program = _Program(self._opened, self._preprocess)
            found = self._program.run(len(images), lambda i: self._read(images[i]), self._label)
            self._remembered[key] = found
            if len(self._remembered) > REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
        return self._remembered[key]

    @property
    def _label(self) -> str:
        return f"features of {self.network.name}"

    def _read(self, image: np.ndarray) -> Row:
        resize = self.network.resize == PILLOW_BICUBIC
        return {"image": pillow_bicubic(image, self.network.size) if resize else image}

    def _preprocess(self, row: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        x_bhwc = row["image"].astype(jnp.float32)
        if self.network.resize == TF1_BILINEAR:
            x_bhwc = tf1_bilinear(x_bhwc, self.network.size)
        mean, std = (jnp.asarray(c, jnp.float32) for c in (self.network.mean, self.network.std))
        return ((x_bhwc - mean[None, None, None]) / std[None, None, None],)


class Hashed(Sequence):
    """Images whose hash is computed once.

    Attributes:
      images: uint8 [N, H, W, 3].
    """

    def __init__(self, images: Sequence[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        return self.images[index]

    @functools.cached_property
    def sha256(self) -> str:
        return content_sha256(self.images)


class CaptionExtractor:
    """Maps captions to CLIP's embeddings, float32 [N, 768] of length 1."""

    def __init__(self, path: Path):
        """Opens the text tower in a CLIP file, and the vocabulary beside the file.

        Raises:
          UserError: the file or the vocabulary is missing or damaged.
        """
        try:
            self._tokenizer = load_tokenizer(path.parent, "CLIPTokenizer")
        except UserError as e:
            raise UserError(
                f"--{FLAG}: clip_score also needs tokenizer.json beside {path.name}: {e}"
            ) from e
        self._opened = clip.open_text_tower(path)
        self._program: _Program | None = None

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns one embedding per caption. A caption over 77 tokens is cut, as CLIP's code does.

        Raises:
          UserError: a caption is not valid Unicode.
        """
        distinct = list(dict.fromkeys(captions))
        if self._program is None:
            self._program = _Program(self._opened, lambda row: (row["ids"], row["mask"]))
        found = self._program.run(
            len(distinct), lambda i: self._read(distinct[i]), "embeddings of captions"
        )
        rows = {caption: i for i, caption in enumerate(distinct)}
        return found[[rows[caption] for caption in captions]]

    def _read(self, caption: str) -> Row:
        ids = self._tokenizer.encode(caption)
        if len(ids) > TOKENS:
            ids = [*ids[: TOKENS - 1], ids[-1]]
        padded = np.zeros(TOKENS, np.int32)
        padded[: len(ids)] = ids
        return {"ids": padded, "mask": np.arange(TOKENS) < len(ids)}


class _Program:
    """A frozen network on the device mesh: weights on every device, batches split over all."""

    def __init__(
        self,
        opened: Opened,
        preprocess: Callable[[dict[str, jax.Array]], tuple[jax.Array, ...]],
    ):
        self._mesh = sharding.make_mesh(sharding.MeshConfig())
        whole = sharding.replicated(self._mesh)
        apply, weights = opened.load()
        self._weights = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), weights
        )

        def run(weights, batch):
            # By default TPUs multiply float32 in bfloat16, and GPUs in TF32.
            with jax.default_matmul_precision("highest"):
                return apply(weights, *preprocess(batch))

        self._run = jax.jit(run, out_shardings=whole)

    def run(self, num: int, read: Callable[[int], Row], label: str) -> np.ndarray:
        """Returns the features float32 [num, dim] of the rows that `read` returns by index."""
        ways = sharding.batch_ways(self._mesh)
        share, num_shares = sharding.batch_share(self._mesh)
        # Few shapes, because each compiles a program; small ones for few images.
        rows = min(ROWS, 1 << (-(-num // ways) - 1).bit_length()) * ways
        mine = rows // num_shares
        features, running = [], None
        bar = tqdm(total=num, desc=label, leave=False, delay=3, disable=jax.process_index() > 0)
        with ThreadPoolExecutor() as pool, bar:
            for start in range(0, num, rows):
                first = start + share * mine
                indices = (min(i, num - 1) for i in range(first, first + mine))
                batch = sharding.put_batch(self._mesh, _stack(list(pool.map(read, indices))))
                # The devices compute this batch while the host reads the next.
                running, done = self._run(self._weights, batch), running
                if done is not None:
                    features.append(np.asarray(done))
                bar.update(min(rows, num - start))
            features.append(np.asarray(running))
        return np.concatenate(features)[:num]


def _stack(rows: list[Row]) -> Row:
    shapes = sorted({value.shape for row in rows for value in row.values() if value.ndim == 3})
    if len(shapes) > 1:
        raise UserError(f"the images have sizes {shapes[0]} and {shapes[1]}; they must be equal")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def content_sha256(images: Sequence[np.ndarray]) -> str:
    """Returns a hash of a set of images: its own `sha256` if it has one, else of all pixels."""
    known = getattr(images, "sha256", None)
    if known is not None:
        return known
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.shape}".encode())
        digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def pillow_bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """Crops to the center square and resizes to uint8 [size, size, 3]; shrinking antialiases."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def tf1_bilinear(x_bhwc: jax.Array, size: int) -> jax.Array:
    """Resizes as TensorFlow 1's resize_bilinear: corners at 0, no antialiasing.

    The source of output row i is i * old / new; later libraries center the pixels.
    """

    def along(x, axis):
        old = x.shape[axis]
        where = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = where.astype(np.int32)
        shape = [1] * x.ndim
        shape[axis] = size
        weight = (where - low).reshape(shape)
        below = jnp.take(x, low, axis)
        return below + (jnp.take(x, np.minimum(low + 1, old - 1), axis) - below) * weight

    return along(along(x_bhwc, 2), 1)
