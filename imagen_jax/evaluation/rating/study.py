"""A study on disk: a database, and copies of the pictures under names that say nothing.

    study.sqlite      trials, raters, answers
    pictures/ID.webp  as shown in a set; ID-full.webp: enlarged, if it is larger

The copies have no metadata: samples carry the names of their checkpoints.
"""

from __future__ import annotations

import concurrent.futures
import random
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import new_folder
from imagen_jax.common.pictures import FORMATS, MOST_PIXELS, to_rgb
from imagen_jax.evaluation.rating import folders, protocols
from imagen_jax.evaluation.rating.folders import Folder
from imagen_jax.evaluation.rating.protocols import Picture, Trial
from imagen_jax.evaluation.rating.store import Store

DATABASE = "study.sqlite"
PICTURES = "pictures"
SHOWN = 320  # pixels of a picture in a set
PIXELS = 128  # up to this size, enlarging does not smooth
TILES = 8  # rows and columns of a scrambled picture
PROTOCOLS = ("drawbench", "coco")


def open_store(study: Path) -> Store:
    """Returns the database of a study.

    Raises:
      UserError: there is none.
    """
    if not (study / DATABASE).is_file():
        raise UserError(f"--study={study} holds no study; start one with --a, --b and --protocol")
    store = Store(study / DATABASE)
    store.settings()
    return store


def create(
    study: Path,
    protocol: str,
    models: Mapping[str, Path],
    *,
    references: Path | None = None,
    categories: Path | None = None,
    samples: int = protocols.SAMPLES,
    pairs: int = protocols.PAIRS,
    seed: int = 0,
) -> Store:
    """Plans a study, copies its pictures, and publishes the folder when it is complete.

    Args:
      study: the folder; must not exist yet.
      protocol: one of PROTOCOLS.
      models: name -> folder.
      references: folder of real images; for coco.
      categories: file of the prompts' categories; for drawbench.
      samples: pictures a side, for drawbench.
      pairs: most captions, for coco.

    Raises:
      UserError: a folder or picture cannot be used; the message names it.
    """
    rng = random.Random(seed)
    read = {name: folders.read(path, _flag(i)) for i, (name, path) in enumerate(models.items())}
    folders.check_same_prompts(read.values())
    if protocol == "drawbench":
        first = next(iter(read.values()))
        named = folders.read_categories(categories) if categories else first.categories
        trials = protocols.drawbench(read, named, samples, rng)
    else:
        if references is None:
            raise UserError("--protocol=coco needs --references=FOLDER, the real images")
        real = folders.read(references, "references")
        sizes = {name: _size_of(folder) for name, folder in read.items()}
        trials = protocols.coco(read, real, sizes, pairs, rng)
    settings = {
        "protocol": protocol,
        "models": {name: str(path.resolve()) for name, path in models.items()},
        "references": str(references.resolve()) if references else None,
        "samples": samples,
        "seed": seed,
        "results": secrets.token_urlsafe(12),
    }
    if study.exists() and (not study.is_dir() or any(study.iterdir())):
        raise UserError(f"--study={study} exists and holds no study; name another folder")
    with new_folder(study, "study", 0o700) as folder:  # the links are secrets
        shown, settings["pixelated"] = _copy(trials, folder / PICTURES)
        rows = [
            trial._asdict() | {"sides": [[shown[p] for p in side] for side in trial.sides]}
            for trial in trials
        ]
        Store(folder / DATABASE).create(settings, rows)
    return Store(study / DATABASE)


def check_same(store: Store, given: Mapping[str, Any], study: Path) -> None:
    """Raises UserError if a study was made from other settings than the given ones."""
    settings = store.settings()
    for name, value in given.items():
        if value != settings[name]:
            raise UserError(
                f"--study={study} has {name} {settings[name]}, not {value}; "
                "name another folder for another study"
            )


def _flag(i: int) -> str:
    return "ab"[i] if i < 2 else "model"


def _size_of(folder: Folder) -> int:
    file = next(iter(folder.pictures.values()))[0]
    return min(_decode(file).size)


def _copy(trials: list[Trial], folder: Path) -> tuple[dict[Picture, str], bool]:
    """Writes each picture once. Returns their random names and whether all are small."""
    from tqdm import tqdm

    folder.mkdir()
    wanted = list(dict.fromkeys(p for trial in trials for side in trial.sides for p in side))
    random.shuffle(wanted)  # or the times of the files would tell who owns them
    names = {picture: secrets.token_hex(8) for picture in wanted}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sizes = pool.map(lambda picture: _write(picture, folder / names[picture]), wanted)
        try:
            largest = max(tqdm(sizes, total=len(wanted), desc="copying", unit="picture"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return names, largest <= PIXELS


def _write(picture: Picture, path: Path) -> int:
    """Writes the copies of a picture; returns its larger side."""
    image = _decode(picture.path)
    if picture.size:
        square = (picture.size, picture.size)
        image = ImageOps.fit(image, square, Image.Resampling.LANCZOS)
    if picture.scrambled:
        image = scrambled(image)
    if max(image.size) <= SHOWN:
        image.save(
            path.with_suffix(".webp"), lossless=True, quality=20, method=1
        )  # quality is the effort
        return max(image.size)
    image.save(path.with_name(f"{path.name}-full.webp"), quality=95)
    small = image.copy()
    small.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    small.save(path.with_suffix(".webp"), quality=90)
    return max(image.size)


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{path} is larger than {MOST_PIXELS:,} pixels")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Exception as e:  # decoders raise anything on a broken file
        raise UserError(f"{path} is not a readable picture ({type(e).__name__})") from e


def scrambled(image: Image.Image) -> Image.Image:
    """Returns the picture cut into TILES x TILES tiles in a random order: a control for realism."""
    side = max(1, min(image.size) // TILES)
    pixels = np.asarray(image)[: side * TILES, : side * TILES]
    tiles = pixels.reshape(TILES, side, TILES, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    tiles = tiles[np.random.default_rng(0).permutation(len(tiles))]
    tiles = tiles.reshape(TILES, TILES, side, side, 3).swapaxes(1, 2)
    return Image.fromarray(tiles.reshape(side * TILES, side * TILES, 3)).resize(image.size)
