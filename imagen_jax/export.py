"""Exports the weights of a run, or of a cascade of several, with a model card.

    python -m imagen_jax.export --workdir=runs/demo --format=safetensors --out=exports/demo

    safetensors  the weights: every command here takes the folder in place of a run, as does PyTorch
    orbax        the weights as an Orbax checkpoint
    stablehlo    the weights, the sampler and one denoising step, for JAX without this code
    onnx         one denoising step with its weights

A cascade, --workdir=runs/base64,runs/sr256, gives a folder per stage. docs/export.md has the
layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import check_new_folder, new_folder, read_json

if TYPE_CHECKING:
    from imagen_jax.config import Config
    from imagen_jax.diffusion.sampler import SamplerConfig
    from imagen_jax.exporting.card import Data
    from imagen_jax.exporting.layout import Writer

FORMATS = ("safetensors", "orbax", "stablehlo", "onnx")
DTYPES = ("float32", "bfloat16")
# Flags that only some formats read.
ONLY_FOR = {"prompts": ("stablehlo", "onnx"), "batch_size": ("onnx",)}

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    cli.define_cascade_flags()
    flags.DEFINE_string("out", None, "Folder to write, or gs://; new, or empty.", required=True)
    flags.DEFINE_enum("format", "safetensors", FORMATS, "What to write.")
    flags.DEFINE_enum(
        "weights", "ema", ("ema", "raw"), "The EMA that training keeps, or the weights themselves."
    )
    flags.DEFINE_list(
        "ema",
        None,
        "Width (sigma_rel) of another average, rebuilt from the run's snapshots. Per stage.",
    )
    flags.DEFINE_enum(
        "dtype", "float32", DTYPES, "Type of the weights in the files; onnx has float32."
    )
    flags.DEFINE_string(
        "license", "", "License of the weights, for the model card, such as apache-2.0."
    )
    default = "per stage (default: the run's config). The exported config has it as its default."
    flags.DEFINE_list("guidance", None, f"Guidance weight, {default}")
    flags.DEFINE_list("steps", None, f"Sampling steps, {default}")
    flags.DEFINE_string(
        "prompts", None, "For stablehlo and onnx: prompts, separated by ;, to embed as inputs."
    )
    flags.DEFINE_integer("batch_size", None, "For onnx: batch size (default: 1).", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Checks the flags, loads the weights and writes the folder."""
    del argv
    # Later imports are in the functions that use them, so that --help and bad input answer at once.
    from imagen_jax.runs import workdir as runs

    check_flags()
    widths = cli.parse_numbers("ema", FLAGS.ema) if FLAGS.ema else None
    out = to_path(FLAGS.out)
    check_new_folder(out, "out")
    workdirs = FLAGS.workdir or [runs.only_run()]
    for workdir in workdirs:
        runs.check_run(workdir)
    write = writer()

    from imagen_jax.exporting import layout
    from imagen_jax.pipeline import cascade
    from imagen_jax.pipeline.settings import SettingError

    raw = FLAGS.weights == "raw"
    try:
        stages = cascade.load(*workdirs, step=FLAGS.step, ema=widths, raw=raw).stages
        samplers = samplers_of([stage.stage.config for stage in stages])
    except SettingError as e:
        raise UserError(f"--{e}") from e
    export = layout.Export(
        stages, samplers, FLAGS.format, write, FLAGS.dtype, raw, FLAGS.license, describe_data
    )
    with new_folder(out, "out") as folder:
        layout.write(folder, export)
    print(out)


def check_flags() -> None:
    """Raises UserError for flags that exclude each other."""
    if FLAGS.weights == "raw" and FLAGS.ema:
        raise UserError("--weights=raw and --ema are set; choose one")
    for flag, formats in ONLY_FOR.items():
        if FLAGS[flag].value is not None and FLAGS.format not in formats:
            raise UserError(f"--{flag} is for --format={' or '.join(formats)}, not {FLAGS.format}")
    if FLAGS.format == "onnx" and FLAGS.dtype != "float32":
        raise UserError(f"--dtype is {FLAGS.dtype}; allowed with --format=onnx: float32")


def writer() -> Writer:
    """Returns what writes the files of the format.

    Raises:
      UserError: a library that the format needs is missing.
    """
    kind, dtype, batch_size = FLAGS.format, FLAGS.dtype, FLAGS.batch_size or 1
    prompts = [p.strip() for p in (FLAGS.prompts or "").split(";") if p.strip()]
    if kind == "onnx":
        from imagen_jax.exporting import onnx

        onnx.check_installed()
        return lambda folder, stage, _: onnx.write(folder, stage, batch_size, prompts)
    if kind == "stablehlo":
        from imagen_jax.exporting import stablehlo

        return lambda folder, stage, s: stablehlo.write(folder, stage, s, dtype, prompts)
    from imagen_jax.runs import exported

    write = {"safetensors": exported.write_tensors, "orbax": exported.write_orbax}[kind]
    return lambda folder, stage, _: write(folder, stage.params, dtype)


def samplers_of(configs: Sequence[Config]) -> list[SamplerConfig]:
    """Returns the samplers of the stages, with --guidance and --steps applied.

    Raises:
      SettingError: one is out of range.
    """
    from imagen_jax.pipeline.settings import Settings, samplers

    found = samplers(Settings(guidance=FLAGS.guidance, steps=FLAGS.steps), configs)
    # Whether to run guidance's passes in one batch is a setting of each call.
    return [
        dataclasses.replace(s, guidance_batched=c.sampling.guidance_batched)
        for s, c in zip(found, configs, strict=True)
    ]


def describe_data(config: Config) -> Data:
    """Returns what the datasets of a run, if they are on this machine, say about themselves."""
    from data_pipelines.reading.check import dataset_of, rates_of
    from imagen_jax.exporting.card import Data

    found = Data([], [])
    for task, rate in rates_of(config.data).items():
        name = dataset_of(task)
        found.rows.append(("dataset", name if rate == 1 else f"{name}, weight {rate:g}"))
        try:
            _describe_dataset(found, config.data.dir, name)
        except UserError as e:  # not on this machine, or damaged
            found.rows.append(("", str(e).partition(";")[0]))
    return found


def _describe_dataset(data: Data, data_dir: str, name: str) -> None:
    from etils import epath

    from data_pipelines.records import prepared

    if not prepared.exists(data_dir, name):
        raise UserError("not on the machine of the export, so nothing else is known")
    path = epath.Path(prepared.find(data_dir, name))
    info = prepared.dataset_info(data_dir, name)
    data.rows.extend((f"{split} records", f"{n:,}") for split, n in info.num_examples.items())
    if (manifest := path / prepared.MANIFEST).exists():
        fields = read_json(manifest)
        data.rows.extend((key, str(fields[key])) for key in ("date", "digest") if key in fields)
    if (card := path / "card.md").exists():
        _, _, section = card.read_text().partition("## Known risks\n")
        data.risks.extend(line[2:] for line in section.splitlines() if line.startswith("- "))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
