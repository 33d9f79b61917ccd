"""Compares text encoders and text conditioning by training the demo's recipe with each.

    python -m benchmarks.text_ablation --steps=2600 --out=text_ablation

Each setting is a training run with the same config, seed and data, except for a few keys of the
section `text` (section 4.4 and appendix D of the paper). The benchmark then samples images for
held-out captions, and a program checks which of them match every claim of their captions. After an
interruption, the same command continues with the current setting and step. It writes table.md and
table.json, with 95% Wilson intervals.

The SentencePiece setting trains its vocabulary on the captions of the train split. Its encoder has
the shape of byte-tiny and random weights, so compare it with random weights on bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines.embeddings.shards import finish
from data_pipelines.embeddings.store import create_store
from imagen_jax.common import cli, typed_config
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_text
from imagen_jax.common.intervals import wilson
from imagen_jax.config import Config, parse
from imagen_jax.diffusion.conditioning import stack_text
from imagen_jax.evaluation.alignment import alignment
from imagen_jax.stage import load
from imagen_jax.training import experiment

FLAGS = flags.FLAGS
SENTENCEPIECE = "sentencepiece-tiny-random"
VOCABULARY = 512

# Name of a setting and of its folder -> the config keys it changes.
SETTINGS: dict[str, dict[str, Any]] = {
    "pooled_only": {"text.sequence": "none"},
    "cross_attention": {"text.sequence": "cross_attention"},
    "cross_attention_layernorm": {"text.sequence": "cross_attention_layernorm"},
    "mean_pooling": {"text.pooling": "mean"},
    "random_weights": {"text.encoder": "byte-tiny-random"},
    "sentencepiece_random_weights": {"text.encoder": SENTENCEPIECE},
    "trained_and_random": {
        "text.encoder": "byte-tiny+byte-tiny-random",
        "text.dim": (128, 128),
        "text.max_tokens": (64, 64),
    },
}


def define_flags() -> None:
    cli.define_config_flags("configs/demo.py:unet", "Config of a base model on the scenes.")
    flags.DEFINE_list("settings", list(SETTINGS), f"Settings to run, from {', '.join(SETTINGS)}.")
    flags.DEFINE_integer("steps", 2600, "Number of training steps per setting.", 1)
    flags.DEFINE_integer("num", 500, "Number of held-out captions to sample images for.", 1)
    flags.DEFINE_string(
        "out", "text_ablation", "Folder of the runs and tables; created if missing."
    )


def main(argv: list[str]) -> None:
    """Runs the settings that have no result yet and prints a Markdown table."""
    del argv
    for name in FLAGS.settings:
        if name not in SETTINGS:
            raise UserError(f"--settings has {name!r}; allowed: {', '.join(SETTINGS)}")
    with cli.quiet_imports():
        from data_pipelines.reading.reader import build
    out = Path(FLAGS.out).absolute()
    base = read_config({})
    build(base)
    results = {name: run(base, out, name) for name in FLAGS.settings}
    text = table(results)
    print(text)
    write_text(out / "table.md", text)
    write_text(out / "table.json", json.dumps(results, indent=1) + "\n")


def read_config(changes: dict[str, Any]) -> Config:
    """Returns the config that the flags name, with some keys changed."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    steps = [f"num_steps={FLAGS.steps}", f"checkpoint_every={min(300, FLAGS.steps)}"]
    return parse(typed_config.load(FLAGS.config, [*FLAGS.set, *steps, *overrides]))


def run(base: Config, out: Path, name: str) -> dict[str, Any]:
    """Returns the result of one setting and stores it in the setting's folder."""
    changes, path = dict(SETTINGS[name]), out / name / "result.json"
    encoder = changes.get("text.encoder", base.text.encoder)
    if encoder != base.text.encoder:
        folders = {n: n for n in encoder.split("+")}
        if encoder == SENTENCEPIECE:
            folders[encoder] = str(sentencepiece_encoder(base, out))
        stores = [str(make_store(base, out / "stores" / n, f)) for n, f in folders.items()]
        changes["text.encoder"] = "+".join(folders.values())
        changes["data.embeddings"] = "+".join(stores)
        changes["data.build"] = False  # the dataset exists, with embeddings of byte-tiny
    config = read_config(changes)
    settings = json.loads(json.dumps({"num": FLAGS.num, "config": dataclasses.asdict(config)}))
    if path.exists() and (result := json.loads(path.read_text()))["settings"] == settings:
        cli.log.info("%s: already done", name)
        return result
    cli.log.info("%s", name)
    from data_pipelines.reading.reader import Reader
    from imagen_jax.training import loop

    loop.train(experiment.build(config), Reader(config), out / name, lambda step: False)
    result = {"settings": settings, **measure(config, out / name)}
    write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def sentencepiece_encoder(base: Config, out: Path) -> Path:
    """Returns the folder of a random encoder like byte-tiny, but on SentencePiece tokens."""
    import sentencepiece
    from flax import nnx

    from imagen_jax.text.hf_format import CONFIG_FILE, save_t5
    from imagen_jax.text.t5 import PRESETS, T5Encoder

    folder = out / SENTENCEPIECE
    if (folder / CONFIG_FILE).exists():  # written last
        return folder
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f.caption for f in captions(base) if f.source.endswith(":train")),
        model_writer=model, vocab_size=VOCABULARY, hard_vocab_limit=False, character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = dataclasses.replace(PRESETS["byte-tiny"], vocab_size=pieces)
    extra = {"tokenizer_class": "T5Tokenizer"}
    save_t5(T5Encoder(config, rngs=nnx.Rngs(0)), folder, dtype=np.float32, extra=extra)
    return folder


def captions(base: Config):
    """Returns the captions of the dataset with their locations."""
    from data_pipelines.embeddings import caption_lists
    from data_pipelines.reading import check

    dataset = check.dataset_of(base.data.task)
    return caption_lists.read_dataset(base.data.dir, dataset)


def make_store(base: Config, path: Path, name: str) -> Path:
    """Returns the store with the embeddings of all captions, after completing it."""
    from data_pipelines.embeddings import encoding

    encoder = encoding.load_encoder(name, base.text.max_tokens, fsdp=1)
    store = create_store(str(path), encoder.identity, "bfloat16", num_shards=1)
    encoding.encode(store, encoding.assign(store, captions(base), 0, 1), encoder)
    finish(store)
    return path


def measure(config: Config, workdir: Path) -> dict[str, Any]:
    """Returns the number of parameters, the held-out loss and the alignment per category.

    The alignment of a category is its number of images, the number that match every claim, and the
    share of correct claims. The category "all" covers all images.
    """
    from data_pipelines.reading.reader import Reader
    from data_pipelines.scenes.check import check_example

    reader = Reader(config)
    stage, params = load(workdir)
    rows = reader.examples(config.data.sample_split, FLAGS.num)
    cond = stack_text(rows)
    seeds = np.arange(len(rows), dtype=np.uint32)
    with tqdm(total=len(rows), desc="sampling", unit="image") as bar:
        images = stage.sample(params, seeds, cond, progress=bar.update)
    by_group = alignment(images, rows, check_example)
    return {
        "params": stage.num_params,
        "loss": stage.held_out_losses(params, reader.eval_batches())["eval_loss"],
        "alignment": {
            category: {
                "num": row["num"],
                "right": round(row["fully"] * row["num"]),
                "claims": row["claims"],
            }
            for category, row in by_group.items()
        },
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats shares of images in percent with intervals, and shares of claims in parentheses."""
    titles = [name.replace("_", " ") for name in results]
    lines = [f"| category | captions | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for category, row in next(iter(results.values()))["alignment"].items():
        cells = []
        for result in results.values():
            row = result["alignment"][category]
            low, high = wilson(row["right"], row["num"])
            share = f"{100 * row['right'] / row['num']:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
            cells.append(f"{share} ({100 * row['claims']:.0f}%)")
        lines.append(f"| {category} | {row['num']} | {' | '.join(cells)} |")
    losses = [f"{result['loss']:.4f}" for result in results.values()]
    sizes = [f"{result['params']:,}" for result in results.values()]
    lines.append(f"| held-out loss | | {' | '.join(losses)} |")
    lines.append(f"| parameters | | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
