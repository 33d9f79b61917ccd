"""Models that rewrite captions: a Python function, or an HTTP endpoint of OpenAI's kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image

from imagen_jax.common import endpoint
from imagen_jax.common.errors import UserError

# Takes RGB images and their captions and returns one text for each; an empty one leaves it alone.
Rewriter = Callable[[list[Image.Image], list[str]], list[str]]

PROMPT = (
    "Describe this image in one or two plain sentences: objects, colors, positions, style, and any "
    "text in quotes. Its present caption is: {caption}"
)
_ADVICE = "Finished shards are kept: run the same command again"


def load(model: str, name: str, prompt: str) -> Rewriter:
    """Loads a rewriter.

    Args:
      model: "package.module:function", or the address of an endpoint that has /chat/completions.
      name: the endpoint's name of the model.
      prompt: what to ask an endpoint; {caption} is replaced by the caption.

    Raises:
      UserError: there is no such function.
    """
    if model.startswith(("http://", "https://")):
        return partial(_ask_all, model, name, prompt)
    module, colon, function = model.partition(":")
    if not colon:
        raise UserError(
            f"--model is {model!r}; allowed: package.module:function, or an address such as "
            "http://localhost:8000/v1"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"--model={model} cannot be imported: {e}") from e


def _ask_all(
    address: str, name: str, prompt: str, images: list[Image.Image], captions: list[str]
) -> list[str]:
    with ThreadPoolExecutor(len(images)) as pool:
        return list(pool.map(partial(_ask, address, name, prompt), images, captions))


def _ask(address: str, name: str, prompt: str, image: Image.Image, caption: str) -> str:
    text, encoded = prompt.replace("{caption}", caption), endpoint.encode(image, "jpeg")
    return endpoint.ask(address, name, text, encoded, advice=_ADVICE)
