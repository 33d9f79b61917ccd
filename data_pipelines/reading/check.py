"""Checks the data of a run against its config before anything slow.

Reads only the JSON files beside the records and imports neither TensorFlow nor tfds, so a command
can report missing data in milliseconds.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from data_pipelines.embeddings.store import check_identity, open_store
from data_pipelines.records import prepared
from imagen_jax.common.errors import UserError
from imagen_jax.common.typed_config import require

if TYPE_CHECKING:
    from imagen_jax.config import Config
    from imagen_jax.sections import DataConfig

MIXTURE = "mixture"  # the name of data.task for the tasks in data.mixture
# SeqIO tasks and the datasets they read. Any other dataset is a task of its own name.
TASKS = {
    "scenes_32": "scenes/32",
    "scenes_64": "scenes/64",
    "scenes_256": "scenes/256",
    "scenes_1024": "scenes/1024",
    "emoji": "emoji",
    "folder": "folder",
}
SPLITS = ("train", "validation", "heldout")


def dataset_of(task: str) -> str:
    """Returns the dataset that a task reads, as a path in data.dir."""
    return TASKS.get(task, task)


def rates_of(data: DataConfig) -> dict[str, float]:
    """Returns the tasks of a run and their rates: one task, data.mixture, or a SeqIO mixture.

    SeqIO knows the mixtures that the config file, or a module that it imports, has registered.
    """
    if data.task == MIXTURE:
        return dict(data.mixture)
    if (seqio := sys.modules.get("seqio")) and data.task in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(data.task)
        return {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
    return {data.task: 1.0}


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
        if not prepared.exists(data.dir, TASKS[data.task]):
            _check_stores(config)
            return
    check_dataset(config)


def check_dataset(config: Config) -> None:
    """Checks that the datasets of `data.task` exist and fit a run's config.

    Raises:
      UserError: a task is unknown; a dataset or a store of embeddings is missing; a split that the
        run reads is missing; the images are too small; captions have no categories to select by, or
        not the names in data.caption_weights; or the embeddings are from another encoder.
    """
    for task in rates_of(config.data):
        _check_task(config, task)
    if config.data.caption_weights:
        _check_caption_weights(config.data)
    if config.stores:
        _check_stores(config)


def _check_caption_weights(data: DataConfig) -> None:
    """Checks that each name in data.caption_weights is one of the captions' names."""
    found = [prepared.caption_sources(data.dir, dataset_of(task)) for task in rates_of(data)]
    if None in found:
        return
    names = ", ".join(sorted({name for sources in found for name in sources}))
    for name in data.caption_weights:
        if name not in names.split(", "):
            raise UserError(
                f"config.data.caption_weights has {name!r}; the captions of "
                f"data.task={data.task} in {data.dir} "
                + (f"are named: {names}" if names else "have no names; recaption adds named ones")
            )


def _check_task(config: Config, task: str) -> None:
    data, name = config.data, dataset_of(task)
    known = task in TASKS or prepared.exists(data.dir, name)
    names = f"{', '.join(TASKS)}, {MIXTURE}, or a dataset in data.dir={data.dir}"
    require(known, "data.task", task, names)
    info = prepared.dataset_info(data.dir, name, **_suggested_flags(config))
    reads = {"train"}
    reads |= {data.eval_split} if config.eval_every and config.eval_batches else set()
    reads |= {data.sample_split} if config.sample_every else set()
    reads |= {e.split or data.sample_split for e in config.evaluations.values()}
    for split in sorted(reads):
        check_split(task, info.num_examples, split)
    if name == "folder" and data.categories:
        raise no_categories(name)
    size = name.partition("/")[2]
    resolution = int(size if size.isdecimal() else info.settings.get("resolution") or 0)
    if 0 < resolution < config.full_size:
        key = "data.image_size" if data.image_size else "model.image_size"
        again = f", or prepare them again with --resolution={config.full_size} --overwrite"
        raise UserError(
            f"config.{key} is {config.full_size}; the images of data.task={task} in "
            f"{data.dir} are {resolution}x{resolution}: lower it{'' if '/' in name else again}"
        )
    if config.stores:
        return
    if info.text_identity is None:
        raise UserError(
            f"config.data.embeddings is '', but the records of data.task={task} hold no "
            "embeddings; make a store with: python -m data_pipelines.encode_text "
            f"--dataset={name} --data_dir={data.dir} --out=STORE"
        )
    _require_stores(config, 1)
    check_identity(info.text_identity, *config.text.parts[0], f"data.task={task} in {data.dir}")


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
