"""What reading the caption is worth: the demo's recipe with other text encoders and conditioning.

    python -m benchmarks.text_ablation --steps=2600 --out=text_ablation

Every setting is a training run of the same config, seed and data in which a few keys of the section
`text` differ (section 4.1 and figure 4 of the paper). Held-out captions are then drawn, and a
program checks which pictures do all that their caption says. Killed and started again, it goes on
with the setting, and the step, that it was at. Writes table.md and table.json, whose intervals are
Wilson's, at 95%.

The vocabulary of the SentencePiece setting is trained on the captions of the train split; its
encoder has the shape of byte-tiny. It has no training, so what it compares with is random weights
on bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
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
from imagen_jax.config import Config, parse
from imagen_jax.evaluation.alignment import alignment
from imagen_jax.stage import load
from imagen_jax.training import experiment

FLAGS = flags.FLAGS
SENTENCEPIECE = "sentencepiece-tiny-random"
VOCABULARY = 512

# The setting's name, which is that of its folder: keys that differ from the config.
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
    cli.define_config_flags("configs/demo.py", "A config of a base model on the scenes.")
    flags.DEFINE_list("settings", list(SETTINGS), f"Which: {', '.join(SETTINGS)}.")
    flags.DEFINE_integer("steps", 2600, "Training steps of each.", 1)
    flags.DEFINE_integer("num", 500, "Held-out captions that are drawn.", 1)
    flags.DEFINE_string("out", "text_ablation", "Folder of the runs and the tables.")


def main(argv: list[str]) -> None:
    """Trains and draws what is not there yet, prints a table in Markdown."""
    del argv
    for name in FLAGS.settings:
        if name not in SETTINGS:
            raise UserError(f"--settings has {name!r}; allowed: {', '.join(SETTINGS)}")
    with cli.quiet_imports():
        from data_pipelines.reading import batches
    out = Path(FLAGS.out).absolute()
    base = read_config({})
    batches.build(base)
    results = {name: run(base, out, name) for name in FLAGS.settings}
    text = table(results)
    print(text)
    write_text(out / "table.md", text)
    write_text(out / "table.json", json.dumps(results, indent=1) + "\n")


def read_config(changes: dict[str, Any]) -> Config:
    """The config of the flags with other values for some keys."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    steps = [f"num_steps={FLAGS.steps}", f"checkpoint_every={min(300, FLAGS.steps)}"]
    return parse(typed_config.load(FLAGS.config, [*FLAGS.set, *steps, *overrides]))


def run(base: Config, out: Path, name: str) -> dict[str, Any]:
    """The result of one setting, which is kept in its folder."""
    changes, path = dict(SETTINGS[name]), out / name / "result.json"
    encoder = changes.get("text.encoder", base.text.encoder)
    if encoder != base.text.encoder:
        folders = {n: n for n in encoder.split("+")}
        if encoder == SENTENCEPIECE:
            folders[encoder] = str(sentencepiece_encoder(base, out))
        stores = [str(store(base, out / "stores" / n, f)) for n, f in folders.items()]
        changes["text.encoder"] = "+".join(folders.values())
        changes["data.embeddings"] = "+".join(stores)
        changes["data.build"] = False  # the dataset is there, with the embeddings of another
    config = read_config(changes)
    asked = json.loads(json.dumps({"num": FLAGS.num, "config": dataclasses.asdict(config)}))
    if path.exists() and (result := json.loads(path.read_text()))["asked"] == asked:
        cli.log.info("%s is there already", name)
        return result
    cli.log.info("%s", name)
    from data_pipelines.reading.batches import Reader
    from imagen_jax.training import loop

    loop.train(experiment.build(config), Reader(config), out / name, lambda step: False)
    result = {"asked": asked, **measure(config, out / name)}
    write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def sentencepiece_encoder(base: Config, out: Path) -> Path:
    """The folder of an encoder like byte-tiny on pieces of the captions, its weights random."""
    import sentencepiece
    from flax import nnx

    from imagen_jax.text.hf_format import CONFIG_FILE, save_t5
    from imagen_jax.text.t5 import PRESETS, T5Encoder

    folder = out / SENTENCEPIECE
    if (folder / CONFIG_FILE).exists():  # which is written last
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
    """The captions of the data, each with where it is."""
    from data_pipelines.embeddings import caption_lists
    from data_pipelines.reading import tasks

    dataset = tasks.seqio.get_mixture_or_task(base.data.task).source.name
    return caption_lists.read_dataset(base.data.dir, dataset)


def store(base: Config, path: Path, name: str) -> Path:
    """The store of the embeddings of all captions, completed if it is not."""
    from data_pipelines import encode_text

    encoder = encode_text.load_encoder(name, base.text.max_tokens, fsdp=1)
    made = create_store(str(path), encoder.identity, "bfloat16", num_shards=1)
    encode_text.encode(made, encode_text.assign(made, captions(base), 0, 1), encoder)
    finish(made)
    return path


def measure(config: Config, workdir: Path) -> dict[str, Any]:
    """The last held-out loss, and of each category: pictures, those right in all, share of claims.

    The category "all" is that of all pictures.
    """
    from data_pipelines.reading.batches import Reader, stack_text
    from data_pipelines.scenes.check import check_example

    reader = Reader(config)
    stage, params = load(workdir)
    rows = reader.examples(config.data.sample_split, FLAGS.num)
    cond = stack_text(rows)
    seeds = np.arange(len(rows), dtype=np.uint32)
    with tqdm(total=len(rows), desc="drawing", unit="image") as bar:
        images = stage.sample(params, seeds, cond, progress=bar.update)
    found = alignment(images, rows, check_example)
    return {
        "params": stage.num_params,
        "loss": stage.held_out_loss(params, reader.eval_batches()),
        "alignment": {
            category: {
                "num": row["num"],
                "right": round(row["fully"] * row["num"]),
                "claims": row["claims"],
            }
            for category, row in found.items()
        },
    }


def wilson(right: int, num: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share: within [0, 1], and not empty at 0 or 1 (Wilson 1927)."""
    middle, scale = (right + z**2 / 2) / (num + z**2), 1 / (num + z**2)
    half = z * scale * math.sqrt(right * (num - right) / num + z**2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Shares in per cent with their intervals, and in brackets those of single claims."""
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
