r"""Adds captions that a model writes to a dataset; the old ones are kept.

    python -m data_pipelines.recaption --task=laion --name=laion_rewritten \
        --model=http://localhost:8000/v1 --model_name=qwen2-vl

The model is an HTTP endpoint of OpenAI's kind (vLLM, llama.cpp and others have one), or a Python
function package.module:function that takes a list of PIL images and a list of captions and returns
a list of strings. The new dataset has the old and the rewritten caption of each image, under two
names. After an interruption, the same command writes what is missing. An endpoint's key comes from
the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import sys

from absl import flags

from data_pipelines.ingestion import options, rewriters
from imagen_jax.common import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("data_dir", "data", "Directory of the datasets.")
    flags.DEFINE_string("task", None, "The dataset to read.", required=True)
    flags.DEFINE_string("name", None, "The dataset to write.", required=True)
    flags.DEFINE_string(
        "model", None, "package.module:function, or http://HOST:PORT/v1.", required=True
    )
    flags.DEFINE_string("model_name", "", "The endpoint's name of the model.")
    flags.DEFINE_string(
        "prompt", rewriters.PROMPT, "What to ask an endpoint; {caption} is the caption."
    )
    flags.DEFINE_string("caption_name", "rewritten", "Name of the new captions.")
    flags.DEFINE_integer("batch_size", 16, "Images in a call; requests at once to an endpoint.", 1)
    flags.DEFINE_string(
        "encoder",
        "byte-tiny",
        "Text encoder that embeds all captions, as for ingest; empty for no embeddings.",
    )
    flags.DEFINE_integer("max_tokens", 192, "Truncate rewritten captions to these tokens.", 1)


def main(argv: list[str]) -> None:
    del argv
    from data_pipelines.ingestion import filters, jobs, recaptioning

    names = ("task", "model", "model_name", "prompt", "caption_name", "encoder", "max_tokens")
    job = recaptioning.Job(
        data_dir=FLAGS.data_dir,
        task=FLAGS.task,
        name=FLAGS.name,
        source=FLAGS.caption_name,
        rewrite=rewriters.load(FLAGS.model, FLAGS.model_name, FLAGS.prompt),
        batch_size=FLAGS.batch_size,
        settings={name: FLAGS[name].value for name in names},
        limit=filters.token_limit(FLAGS.encoder, FLAGS.max_tokens),
        embed=jobs.embedding(FLAGS.encoder, FLAGS.max_tokens),
        date=options.today(),
    )
    folder = recaptioning.run(job)
    print(f"wrote {folder}; see {folder / 'card.md'}", file=sys.stderr)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
