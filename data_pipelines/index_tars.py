r"""Indexes WebDataset tars, so that training can read them where they are.

    python -m data_pipelines.index_tars --tars='/data/laion/*.tar' --data_dir=data --name=laion

writes data/laion/. No pixel is copied. Then embed the captions and train:

    python -m data_pipelines.encode_text --dataset=laion --data_dir=data --out=stores/laion ...
    python -m imagen_jax.train --config.data.task=laion --config.data.embeddings=stores/laion ...

A sample is an image (.jpg, .jpeg, .png, .webp) and a caption (.txt or .json) with the same name, as
img2dataset writes them. The command can be interrupted and run again, and several hosts may run it
at the same time: a tar that is indexed is not read again.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor, as_completed

from absl import flags
from etils import epath
from tqdm import tqdm

from data_pipelines.records import tars
from imagen_jax.common import buckets, cli
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import matching

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_list("tars", None, "Tars, as paths with * and ?, separated by commas.")
    flags.DEFINE_string("name", None, "Name of the dataset, config.data.task of a run.")
    flags.DEFINE_string("data_dir", "data", "Directory of the datasets.")
    flags.DEFINE_float(
        "validation_fraction",
        0.02,
        "Share of the records to hold out: the last ones, at least 16 and at most 10,000.",
        0,
        0.5,
    )
    flags.DEFINE_integer("workers", 4, "Number of processes.", lower_bound=1)
    flags.DEFINE_bool("skip_bad", False, "Leave out tars that cannot be indexed.")


def main(argv: list[str]) -> None:
    """Indexes all tars, then writes tars.json."""
    del argv
    if not FLAGS.tars or not FLAGS.name:
        raise UserError("--tars and --name are needed (see --help)")
    for path in (FLAGS.data_dir, *FLAGS.tars):
        buckets.check(path)
    folder = epath.Path(FLAGS.data_dir) / FLAGS.name
    # Absolute, because a run may start in another folder.
    paths = [p if "://" in p else os.path.abspath(p) for p in matching(FLAGS.tars, "tars")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found, bad = index(paths, folder, FLAGS.workers)
        splits = write(folder, found, bad, len(paths))
    except OSError as e:
        raise UserError(f"{folder} cannot be written to: {e.strerror or e}") from e
    skipped = sum(tar.skipped for tar in found)
    counts = ", ".join(f"{name} {num:,}" for name, num in splits.items())
    cli.log.info("wrote %s: %s", folder / tars.TARS, counts)
    if skipped or bad:
        cli.log.info("left out %d files without image or caption and %d tars", skipped, len(bad))


def write(folder: epath.Path, found: list[tars.Tar], bad: list[str], num: int) -> dict[str, int]:
    """Writes tars.json, and returns the records of each split.

    Raises:
      UserError: some of the `num` tars are bad, and --skip_bad is not set; or all are.
    """
    if bad and not FLAGS.skip_bad:
        raise UserError(
            f"{len(bad)} of {num} tars cannot be indexed, for example {bad[0]}. Replace "
            "them and run this again, which only reads those, or leave them out with --skip_bad"
        )
    if not found:
        raise UserError(f"no tar can be indexed, for example {bad[0]}")
    return tars.write_tars(folder, found, FLAGS.validation_fraction)


def index(paths: list[str], folder: epath.Path, workers: int) -> tuple[list[tars.Tar], list[str]]:
    """Returns the indexed tars in the order of `paths`, and what is wrong with the others."""
    # In random order, so that several hosts index different tars.
    order = random.Random().sample(paths, len(paths))
    done, bad = {}, []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool, tqdm(total=len(paths), unit=" tars") as bar:
        jobs = {pool.submit(_index_tar, path, str(folder)): path for path in order}
        for job in as_completed(jobs):
            result = job.result()
            if isinstance(result, str):
                bad.append(result)
            else:
                done[jobs[job]] = result
            bar.update()
    return [done[path] for path in paths if path in done], sorted(bad)


def _index_tar(path: str, folder: str) -> tars.Tar | str:
    try:
        return tars.index_tar(path, epath.Path(folder))
    except UserError as e:
        return str(e)


if __name__ == "__main__":
    # Import by name, because worker processes cannot find definitions in __main__.
    from data_pipelines import index_tars

    define_flags()
    cli.run(index_tars.main)
