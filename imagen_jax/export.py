"""Exports the weights of a run, or of a cascade of several, with a model card.

    python -m imagen_jax.export --workdir=runs/demo --format=safetensors --out=exports/demo

| format | what it holds | for |
|---|---|---|
| safetensors | the weights and the config | every command here, in place of a run; PyTorch |

A cascade, --workdir=runs/base64,runs/sr256, gives a folder per stage. docs/export.md has the
layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import check_new_folder, new_folder, read_json

if TYPE_CHECKING:
    from imagen_jax.config import Config
    from imagen_jax.exporting.card import Data
    from imagen_jax.exporting.layout import Writer

FORMATS = ("safetensors",)
DTYPES = ("float32", "bfloat16")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    cli.define_cascade_flags()
    flags.DEFINE_string("out", None, "Folder to write; new, or empty.", required=True)
    flags.DEFINE_enum("format", "safetensors", FORMATS, "What to write.")
    flags.DEFINE_enum(
        "weights", "ema", ("ema", "raw"), "The EMA that training keeps, or the weights themselves."
    )
    flags.DEFINE_list(
        "ema",
        None,
        "Width (sigma_rel) of another average, rebuilt from the run's snapshots; one for all "
        "workdirs, or one each.",
    )
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Type of the weights in the files.")
    flags.DEFINE_string(
        "license", "", "License of the weights, for the model card, such as apache-2.0."
    )


def main(argv: Sequence[str]) -> None:
    """Checks the flags, loads the weights and writes the folder."""
    del argv
    # Later imports are here, so that --help and bad input answer at once.
    from imagen_jax.runs import workdir as runs

    widths = cli.parse_numbers("ema", FLAGS.ema) if FLAGS.ema else None
    raw = FLAGS.weights == "raw"
    if raw and widths:
        raise UserError("--weights=raw and --ema are set; choose one")
    out = Path(FLAGS.out)
    check_new_folder(out, "out")
    workdirs = FLAGS.workdir or [runs.only_run()]
    for workdir in workdirs:
        runs.check_run(workdir)
    write = writer(FLAGS.format, FLAGS.dtype)

    from imagen_jax.exporting import layout
    from imagen_jax.pipeline import cascade
    from imagen_jax.pipeline.settings import SettingError

    try:
        pipe = cascade.load(*workdirs, step=FLAGS.step, ema=widths, raw=raw)
    except SettingError as e:
        raise UserError(f"--{e}") from e
    export = layout.Export(
        pipe.stages, FLAGS.format, write, FLAGS.dtype, raw, FLAGS.license, describe_data
    )
    with new_folder(out, "out") as folder:
        layout.write(folder, export)
    print(out)


def writer(kind: str, dtype: str) -> Writer:
    """Returns what writes the files of a format.

    Raises:
      UserError: a library that the format needs is missing.
    """
    from imagen_jax.runs import exported

    return lambda folder, stage: exported.write_tensors(folder, stage.params, dtype)


def describe_data(config: Config) -> Data:
    """Returns what the datasets of a run, if they are on this machine, say about themselves."""
    from etils import epath

    from data_pipelines.reading.check import dataset_of, rates_of
    from data_pipelines.records import prepared
    from imagen_jax.exporting.card import Data

    rows, risks = [], []
    for task, rate in rates_of(config.data).items():
        name = dataset_of(task)
        rows.append(("dataset", name if rate == 1 else f"{name}, weight {rate:g}"))
        if not prepared.exists(config.data.dir, name):
            rows.append(("", "not on the machine of the export, so nothing else is known"))
            continue
        info = prepared.dataset_info(config.data.dir, name)
        rows += [(f"{split} records", f"{n:,}") for split, n in info.num_examples.items()]
        path = epath.Path(prepared.find(config.data.dir, name))
        if (manifest := path / prepared.MANIFEST).exists():
            fields = read_json(manifest)
            rows += [
                ("prepared on", str(fields.get("date"))),
                ("digest", str(fields.get("digest"))),
            ]
        if (found := path / "card.md").exists():
            _, _, section = found.read_text().partition("## Known risks\n")
            risks += [line[2:] for line in section.splitlines() if line.startswith("- ")]
    return Data(rows, risks)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
