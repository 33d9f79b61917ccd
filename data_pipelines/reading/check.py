"""Checks the data of a run against its config before anything slow.

Reads only the JSON files beside the records and imports neither TensorFlow nor tfds, so a command
can report missing data in milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etils import epath

from data_pipelines.embeddings.store import check_identity, open_store
from data_pipelines.records.prepared import INFO, VERSION, dataset_info
from imagen_jax.common.errors import UserError
from imagen_jax.common.typed_config import require

if TYPE_CHECKING:
    from imagen_jax.config import Config

# SeqIO tasks and the datasets they read.
TASKS = {
    "scenes_32": "scenes/32",
    "scenes_64": "scenes/64",
    "scenes_256": "scenes/256",
    "scenes_1024": "scenes/1024",
    "emoji": "emoji",
    "folder": "folder",
}
SPLITS = ("train", "validation", "heldout")


def check_prepared(config: Config) -> None:
    """Checks that a run's data exist and fit its config, or that the run will draw them itself.

    Call it first: it takes milliseconds, while drawing scenes or building a network takes minutes.

    Raises:
      UserError: as `check_dataset`; or data.build is set and data.task has no scenes to draw.
    """
    data = config.data
    if data.build:
        require(data.task in TASKS, "data.task", data.task, ", ".join(TASKS))
        if not data.task.startswith("scenes_"):
            raise UserError(
                f"config.data.build is True, which draws scenes, but config.data.task is "
                f"{data.task!r}; set --config.data.build=false"
            )
        if not (epath.Path(data.dir) / TASKS[data.task] / VERSION / INFO).exists():
            _check_stores(config)
            return
    check_dataset(config)


def check_dataset(config: Config) -> None:
    """Checks that the dataset of `data.task` exists and fits a run's config.

    Raises:
      UserError: the task is unknown; the dataset or a store of embeddings is missing; a split that
        the run reads is missing; the images are too small; captions have no categories to select
        by; or the embeddings are from another encoder.
    """
    data, text = config.data, config.text
    require(data.task in TASKS, "data.task", data.task, ", ".join(TASKS))
    name = TASKS[data.task]
    info = dataset_info(data.dir, name, **_suggested_flags(config))
    reads = {"train"}
    reads |= {data.eval_split} if config.eval_every and config.eval_batches else set()
    reads |= {data.sample_split} if config.sample_every else set()
    for split in sorted(reads):
        check_split(data.task, info.num_examples, split)
    if name == "folder" and data.categories:
        raise no_categories(name)
    resolution = int(name.partition("/")[2] or info.settings.get("resolution", config.full_size))
    if resolution < config.full_size:
        key = "data.image_size" if data.image_size else "model.image_size"
        again = f", or prepare them again with --resolution={config.full_size} --overwrite"
        raise UserError(
            f"config.{key} is {config.full_size}; the images of data.task={data.task} in "
            f"{data.dir} are {resolution}x{resolution}: lower it{'' if '/' in name else again}"
        )
    if config.stores:
        _check_stores(config)
        return
    _require_stores(config, 1)
    where = f"data.task={data.task} in {data.dir}"
    check_identity(info.text_identity, *text.parts[0], where)


def check_split(task: str, num_examples: dict[str, int], split: str) -> None:
    """Raises a UserError unless the dataset of a task has a split."""
    if split not in num_examples:
        raise UserError(
            f"data.task={task} has no split {split!r}; it has: {', '.join(num_examples)}"
        )


def no_categories(name: str) -> UserError:
    """Returns the error for config.data.categories set on a dataset without categories."""
    config = "; configs/folder.py has them unset" if name == "folder" else ""
    return UserError(
        f"config.data.categories is set, but the captions of {name!r} have no categories; set "
        f"--config.data.categories='()'{config}"
    )


def _check_stores(config: Config) -> None:
    """Checks that data.embeddings names one complete store per encoder, made by that encoder."""
    identities = [open_store(store).text_identity for store in config.stores]
    if not identities and len(config.text.parts) == 1:
        return
    _require_stores(config, len(identities))
    for store, identity, part in zip(config.stores, identities, config.text.parts, strict=True):
        check_identity(identity, *part, f"data.embeddings={store}")


def _require_stores(config: Config, num: int) -> None:
    parts = config.text.parts
    allowed = f"{len(parts)} stores joined by +, one for each of text.encoder={config.text.encoder}"
    require(num == len(parts), "data.embeddings", config.data.embeddings, allowed)


def _suggested_flags(config: Config) -> dict[str, Any]:
    """Returns the flags, except those at their defaults, that make a dataset fit a run's config."""
    flags = {}
    if config.full_size > {"folder": 256, "emoji": 64}.get(config.data.task, config.full_size):
        flags["resolution"] = config.full_size
    if not config.stores and len(config.text.parts) == 1:
        if config.text.encoder != "byte-tiny":
            flags["encoder"] = config.text.encoder
        if config.text.max_tokens != 192:
            flags["max_tokens"] = config.text.max_tokens
    return flags
