"""Serves a study in which people compare the pictures of models, and shows its results.

    python -m imagen_jax.rate --a=samples/ema --b=samples/base --protocol=drawbench --study=study
    python -m imagen_jax.rate --study=study              goes on with a study
    python -m imagen_jax.rate --study=study --results    prints the results so far

The two protocols are those of the Imagen paper (docs/rating.md). The command prints a secret link
for each rater. Raters do not see which model drew what; they may close the page and come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from absl import flags

from imagen_jax.common import cli, network
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import replacing

if TYPE_CHECKING:
    from imagen_jax.evaluation.rating.store import Store

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("study", "study", "Directory of the study; created if missing.")
    flags.DEFINE_enum("protocol", None, ["drawbench", "coco"], "Protocol of a new study.")
    flags.DEFINE_string("a", None, "Directory of the first model's pictures, as sample writes it.")
    flags.DEFINE_string("b", None, "Directory of the second model's pictures.")
    flags.DEFINE_multi_string(
        "model", [], "NAME=DIRECTORY of a model; repeat it for more than two, in place of --a, --b."
    )
    flags.DEFINE_string("references", None, "With coco: directory of the real images.")
    flags.DEFINE_string(
        "categories",
        None,
        "With drawbench: CSV or TSV file with the columns Prompts and Category, such as "
        "DrawBench's own (default: what the first model's metadata says, else one category).",
    )
    flags.DEFINE_integer("samples", 8, "With drawbench: pictures in a set.", lower_bound=1)
    flags.DEFINE_integer("pairs", 200, "With coco: largest number of captions.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of what is drawn at random.", lower_bound=0)
    flags.DEFINE_integer(
        "raters", None, "Number of links (default: as the paper; a greater one adds links).",
        lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer(
        "batches", 1, "Batches for each new rater: categories, or 50 images.", lower_bound=1
    )
    flags.DEFINE_bool("results", False, "Print the results so far and end.")
    flags.DEFINE_string("csv", None, "With --results: file to write all answers to.")
    flags.DEFINE_float(
        "margin", 0.05, "Half-width of the intervals that missing raters are counted for.",
        lower_bound=0.001, upper_bound=0.5,
    )  # fmt: skip
    flags.DEFINE_string("host", "127.0.0.1", "Address to serve the pages at; 0.0.0.0 is all.")
    flags.DEFINE_integer(
        "port", 7861, "Port of the pages; 0 takes a free one.", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_string(
        "public_url", None, "URL of a proxy in front of the pages, which the links begin with."
    )


def main(argv: Sequence[str]) -> None:
    """Checks the flags, then prints results or serves the study."""
    del argv
    if FLAGS.results:
        show_results(Path(FLAGS.study))
        return
    if FLAGS.csv:
        raise UserError(f"--csv={FLAGS.csv} needs --results")
    hosts = network.allowed_hosts(FLAGS.host)
    if FLAGS.public_url is not None:
        hosts.append(public_host(FLAGS.public_url))
    bound = network.listen(FLAGS.host, FLAGS.port)  # before the slow part, copying pictures
    store = open_study(Path(FLAGS.study))

    from imagen_jax.evaluation.rating import server

    base = (FLAGS.public_url or network.url(FLAGS.host, bound)).rstrip("/")
    for rater in store.raters():
        print(f"rater {rater.id} ({rater.done} of {rater.total})  {base}/r/{rater.token}/")
    print(f"results  {base}/results/{store.settings()['results']}/")
    print(f"Serving {FLAGS.study} at {network.url(FLAGS.host, bound)} (Ctrl-C ends it)", flush=True)
    server.serve(server.make_app(store, hosts, FLAGS.margin), bound)


def public_host(url: str) -> str:
    """Returns the host name of --public_url.

    Raises:
      UserError: it is no URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise UserError(f"--public_url is {url!r}; it must be like https://example.org/rating")
    return parts.hostname


def models() -> dict[str, Path]:
    """Returns name -> folder of --a and --b, or of --model.

    Raises:
      UserError: both are given, a name repeats, or --model lacks a name or a folder.
    """
    if FLAGS.model and (FLAGS.a or FLAGS.b):
        raise UserError("--model is in place of --a and --b; give one of both")
    if not FLAGS.model:
        paths = [Path(path) for path in (FLAGS.a, FLAGS.b) if path]
        names = [path.resolve().name for path in paths]
        names = names if len(set(names)) == len(names) else list(map(str, paths))
        if len(set(names)) < len(names):
            raise UserError(f"--a and --b are both {paths[0]}")
        return dict(zip(names, paths, strict=True))
    found = {}
    for word in FLAGS.model:
        name, _, path = word.partition("=")
        if not name or not path or name in found:
            raise UserError(f"--model is {word!r}; it must be NAME=DIRECTORY, each name once")
        found[name] = Path(path)
    return found


def open_study(folder: Path) -> Store:
    """Opens the study in a folder, or creates it from the flags; adds raters up to --raters.

    Raises:
      UserError: the flags name another study than the folder holds, or pictures cannot be used.
    """
    from imagen_jax.evaluation.rating import study

    named = models()
    references = Path(FLAGS.references) if FLAGS.references else None
    if (folder / study.DATABASE).exists():
        store = study.open_store(folder)
        given = {
            "protocol": FLAGS.protocol,
            "models": {name: str(path.resolve()) for name, path in named.items()},
            "references": references and str(references.resolve()),
        }
        study.check_same(store, {k: v for k, v in given.items() if v}, folder)
    else:
        if not named or not FLAGS.protocol:
            raise UserError(
                f"--study={folder} holds no study; start one with --a=DIRECTORY, --b=DIRECTORY and "
                "--protocol=drawbench or coco (see --help)"
            )
        if references and FLAGS.protocol == "drawbench":
            raise UserError("--references is for --protocol=coco")
        if FLAGS.categories and FLAGS.protocol == "coco":
            raise UserError("--categories is for --protocol=drawbench")
        store = study.create(
            folder,
            FLAGS.protocol,
            named,
            references=references,
            categories=Path(FLAGS.categories) if FLAGS.categories else None,
            samples=FLAGS.samples,
            pairs=FLAGS.pairs,
            seed=FLAGS.seed,
        )
    wanted = FLAGS.raters
    if wanted is None:
        wanted = 0 if store.raters() else store.usual_raters(FLAGS.batches)
    store.add_raters(wanted, FLAGS.batches, store.settings()["seed"])
    return store


def show_results(folder: Path) -> None:
    """Prints the tables; with --csv, also writes the answers."""
    from imagen_jax.evaluation.rating import results, study

    store = study.open_store(folder)
    print(results.to_text(results.analyze(store, FLAGS.margin)))
    if FLAGS.csv:
        path = Path(FLAGS.csv)
        try:
            with replacing(path) as temporary:
                temporary.write_text(results.to_csv(store.ratings()), newline="")
        except OSError as e:
            raise UserError(f"--csv={path} cannot be written: {e.strerror}") from e
        print(path)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
