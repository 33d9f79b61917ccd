"""COCO's captions: a JSON file of images and annotations, with several captions an image."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from etils import epath

from data_pipelines.common import Skip
from data_pipelines.ingestion import items
from data_pipelines.ingestion.items import Caption, Columns, Source
from data_pipelines.ingestion.sources.listed import Entry, parts_of
from imagen_jax.common.errors import UserError

_START = 2**16  # bytes of a file to look at; COCO's files begin with "info" or "images"


def is_coco(path: epath.Path) -> bool:
    """Returns whether a JSON file looks like COCO's: an object with images or annotations."""
    with path.open("rb") as file:
        start = file.read(_START).lstrip()
    return start.startswith(b"{") and any(
        f'"{key}"'.encode() in start for key in ("images", "annotations")
    )


def annotation_files(root: epath.Path) -> list[epath.Path]:
    """Returns the annotations of captions in a folder laid out like COCO's."""
    found = [*root.glob("annotations/captions_*.json"), *root.glob("captions_*.json")]
    return sorted(path for path in found if is_coco(path))


def find(paths: list[epath.Path], columns: Columns, part_size: int) -> Source:
    """Lists the images that annotation files, or those of a folder, have captions for.

    Raises:
      UserError: a file is not one of captions, or its images are not found.
    """
    files = annotation_files(paths[0]) if paths[0].is_dir() else paths
    if not files:
        raise UserError(
            f"--source={paths[0]} has no annotations/captions_*.json; give the JSON file itself"
        )
    entries: list[Entry] = []
    skipped: list[Skip] = []
    folders = []
    for file in files:
        found, folder = _read(file, columns, skipped, several=len(files) > 1)
        entries += found
        folders.append(folder / "_")
    root = str(items.common_folder(folders))
    parts = parts_of("coco", entries, part_size, root, columns.outside)
    return Source("coco", str(paths[0]), parts, skipped)


def _read(
    path: epath.Path, columns: Columns, skipped: list[Skip], several: bool
) -> tuple[list[Entry], epath.Path]:
    """Returns the images that an annotation file has captions for, and their folder."""
    try:
        content = json.loads(path.read_bytes())
        images, annotations = content["images"], content["annotations"]
        names = {image["id"]: image | {"file_name": str(image["file_name"])} for image in images}
        captions: dict[Any, dict[str, None]] = defaultdict(dict)
        for annotation in annotations:
            captions[annotation["image_id"]][items.collapse(annotation["caption"])] = None
        known = {x["id"]: str(x.get("name", "")) for x in content.get("licenses", [])}
        licenses = {image["id"]: known.get(image.get("license"), "") for image in images}
        for image in images:
            if not items.is_path(image["file_name"]):
                raise ValueError(f"file_name is {image['file_name']!r:.100}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = items.collapse(f"{type(e).__name__}: {e}")[:200]
        raise UserError(
            f"{path}: not COCO captions ({problem}); needed: images with id and file_name, "
            "annotations with image_id and caption"
        ) from e
    folder = _image_folder(path, images, columns)
    prefix = f"{path.stem}/" if several else ""
    entries = []
    for key, image in sorted(names.items(), key=lambda pair: pair[1]["file_name"]):
        name = prefix + items.printable(image["file_name"])
        texts = tuple(Caption(text) for text in captions.pop(key, {}) if text)
        if texts:
            entries.append(Entry(name, str(folder / image["file_name"]), texts, {}, licenses[key]))
        else:
            skipped.append(Skip(name, "missing caption"))
    skipped += [Skip(f"{path.name} image {key}", "caption without an image") for key in captions]
    return entries, folder


def _image_folder(path: epath.Path, images: list[dict], columns: Columns) -> epath.Path:
    """Returns the folder in which the first image exists."""
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    split = path.stem.rpartition("_")[2]  # captions_train2017 -> train2017
    tried = [root / split, root / "images", root / "images" / split, root, root.parent / split]
    tried = [epath.Path(columns.folder)] if columns.folder else tried
    for folder in tried:
        if any((folder / image["file_name"]).exists() for image in images[:8]):
            return folder
    raise UserError(
        f"{path}: its images are not in {', '.join(map(str, tried))}; give their folder as --images"
    )
