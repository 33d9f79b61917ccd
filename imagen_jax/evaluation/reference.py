"""The images that samples are compared with: a folder, statistics in a file, or the examples' own.

Features of references are cached by content below the folder of weights, as .npz files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError, first_line
from imagen_jax.common.files import probe_folder, replacing, sha256
from imagen_jax.common.pictures import to_rgb
from imagen_jax.devices import processes
from imagen_jax.evaluation.distances import Moments, in_blocks, moments
from imagen_jax.evaluation.features import Extractor, Hashed, content_sha256, pillow_bicubic
from imagen_jax.evaluation.networks.table import Network

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of these images, whatever their suffix
VERSION = 1  # of the cache's files
LEAST = 4  # images; precision and recall look for the third neighbor of each


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
      moments: of the features.
      features: float32 [N, D]; None if the file has only statistics.
      protocol: hash, origin and number of the images, as JSON values.
    """

    moments: Moments
    features: np.ndarray | None
    protocol: dict[str, Any]


class ImageFolder(Sequence):
    """The images in a folder and its subfolders, in the order of their paths.

    Each is cropped to its center square and resized to `size` with Pillow's bicubic filter.

    Attributes:
      files: their paths.
    """

    def __init__(self, folder: Path, size: int):
        self.files, self._size = image_files(folder), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns an image, uint8 [size, size, 3].

        Raises:
          UserError: the file is not a readable image.
        """
        path = self.files[index]
        try:
            with Image.open(path, formats=FORMATS) as image:
                pixels = np.asarray(to_rgb(image))
        except Exception as e:  # decoders raise anything on a broken file
            raise UserError(f"--reference: {path} is not a readable image: {first_line(e)}") from e
        return pillow_bicubic(pixels, self._size)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the files' contents, in order, and the size."""
        return sha256(self.files, f"{self._size}".encode())


def image_files(folder: Path) -> list[Path]:
    """Returns the paths of a folder's images, sorted.

    Raises:
      UserError: there are fewer than LEAST.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if len(files) < LEAST:
        kinds = ", ".join(sorted(SUFFIXES))
        raise UserError(
            f"--reference={folder} has {len(files)} images; needed: {LEAST} or more ({kinds})"
        )
    return files


class Source:
    """Where references come from: `path`, or without one the examples' own images."""

    def __init__(self, path: Path | None, cache: Path | None = None):
        """Checks the folder or reads the statistics.

        Args:
          path: a folder of images, or a .npz file.
          cache: as for `of_images`.

        Raises:
          UserError: there is nothing usable at the path.
        """
        self._path, self._cache = path, cache
        self._statistics: Reference | None = None
        self._images: dict[int, ImageFolder] = {}
        self._found: dict[tuple[str, str], Reference] = {}
        self._own: tuple[Sequence[Any], Hashed] | None = None
        if path is None:
            return
        if not path.exists():
            raise UserError(f"--reference={path} does not exist; allowed: a folder or a .npz file")
        if path.is_dir():
            image_files(path)
        else:
            self._statistics = read_statistics(path)

    def check(self, name: str, network: Network, full: bool) -> None:
        """Checks that the reference can serve a metric.

        Args:
          name: the metric's, for messages.
          network: whose features it compares.
          full: whether it needs features, not only their moments.

        Raises:
          UserError: the statistics are of another network, or lack features.
        """
        if self._statistics is None:
            return
        dim = len(self._statistics.moments.mean)
        if dim != network.dim:
            raise UserError(
                f"--reference={self._path} has {dim} features; {name} needs {network.dim}, of "
                f"{network.name}"
            )
        if full and self._statistics.features is None:
            raise UserError(
                f"--reference={self._path} has only mu and sigma; {name} needs a folder of images"
            )

    def get(
        self, name: str, extractor: Extractor, size: int, examples: Sequence[dict[str, Any]]
    ) -> Reference:
        """Returns the reference for samples of `size` pixels that belong to the examples.

        Raises:
          UserError: there are no reference images, or one cannot be read.
        """
        if self._statistics:
            return self._statistics
        if self._path is not None:
            how = f"images of a folder: center crop, Pillow bicubic to {size}x{size}"
            if size not in self._images:
                self._images[size] = ImageFolder(self._path, size)
            images = self._images[size]
        else:
            if any(example.get("image") is None for example in examples):
                raise UserError(
                    f"--metrics={name} needs --reference=FOLDER or FILE.npz, because the prompts "
                    "come without images"
                )
            how = "the examples' own images"
            images = self._own_images(examples)
        key = extractor.network.name, content_sha256(images)
        if key not in self._found:
            self._found[key] = of_images(extractor, images, how, self._cache)
        return self._found[key]

    def _own_images(self, examples: Sequence[dict[str, Any]]) -> Hashed:
        """Returns the images of the examples, read and hashed once for all metrics and columns."""
        if self._own is None or self._own[0] is not examples:
            self._own = examples, Hashed([example["image"] for example in examples])
        return self._own[1]


def of_images(
    extractor: Extractor, images: Sequence[np.ndarray], how: str, cache: Path | None = None
) -> Reference:
    """Extracts the features of reference images, or finds them in the cache.

    Args:
      images: uint8 [N, H, W, 3].
      how: how the images were made, for the protocol.
      cache: the folder of the cache; None for no cache.

    Raises:
      UserError: an image cannot be read.
    """
    content = content_sha256(images)
    network = extractor.network
    fields = [VERSION, content, extractor.sha256, network.name, network.size, network.resize]
    key = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    path = cache / f"{key}.npz" if cache else None
    features = _read_cached(path, len(images), network.dim) if path else None
    # All processes extract together, also if only one of them lacks the file.
    if processes.first_text("missing" if features is None else ""):
        features = extractor(images)
        if path:
            _write_cached(path, features)
    protocol = {"sha256": content, "how": how, "num": len(images)}
    return Reference(moments(in_blocks(features)), features, protocol)


def _read_cached(path: Path, num: int, dim: int) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            features = file["features"]
    except Exception as e:  # NumPy raises anything on a broken file
        log.warning("%s cannot be read (%s); computing it again", path, first_line(e))
        return None
    return features if features.shape == (num, dim) else None


def _write_cached(path: Path, features: np.ndarray) -> None:
    """Writes the features, and the moments under the names that other libraries use."""
    found = moments(in_blocks(features))
    try:
        probe_folder(path.parent)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, features=features, mu=found.mean, sigma=found.cov, num=found.num)
    except OSError as e:
        log.warning("the reference's features are not cached: %s: %s", path.parent, e.strerror)


def read_statistics(path: Path) -> Reference:
    """Reads a .npz file with the arrays mu [D] and sigma [D, D], as pytorch-fid and others write.

    A file of this cache also has features, which KID, CMMD, precision and recall need.

    Raises:
      UserError: the file cannot be read, or lacks an array.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"--reference={path} is not a .npz file; allowed: a folder or a .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("mu", "sigma") if name not in file]
            if missing:
                raise UserError(
                    f"--reference={path} has no array {missing[0]!r}; needed: mu and sigma"
                )
            mean, cov = (file[name].astype(np.float64) for name in ("mu", "sigma"))
            features, num = file.get("features"), int(file.get("num", 0))
    except UserError:
        raise
    except Exception as e:  # NumPy raises anything on a broken file
        raise UserError(f"--reference={path} cannot be read: {first_line(e)}") from e
    width = mean.shape if features is None else features.shape[1:]
    if mean.ndim != 1 or cov.shape != mean.shape * 2 or width != mean.shape:
        raise UserError(
            f"--reference={path} has mu {mean.shape} and sigma {cov.shape}; needed: [D] and [D, D]"
        )
    protocol = {"sha256": sha256([path]), "how": f"statistics in {path.name}", "num": num}
    return Reference(Moments(num, mean, cov), features, protocol)
