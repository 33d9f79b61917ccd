"""Models that rewrite captions: a Python function, or an HTTP endpoint of OpenAI's kind."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image

from imagen_jax.common.errors import UserError

# Takes RGB images and their captions and returns one text for each; an empty one leaves it alone.
Rewriter = Callable[[list[Image.Image], list[str]], list[str]]

PROMPT = (
    "Describe this image in one or two plain sentences: objects, colors, positions, style, and any "
    "text in quotes. Its present caption is: {caption}"
)
_TRIES = 4
_TIMEOUT = 120  # seconds
_PASSING = (408, 409, 429, 500, 502, 503, 504)  # HTTP errors that may pass


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
        return partial(_ask_all, model.rstrip("/"), name, prompt)
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
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    content = [
        {"type": "text", "text": prompt.replace("{caption}", caption)},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}},
    ]
    message = {"role": "user", "content": content}
    body = {"model": name, "messages": [message], "temperature": 0, "seed": 0, "max_tokens": 256}
    reply = _post(f"{address}/chat/completions", body)
    try:
        return reply["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as e:
        raise UserError(f"--model={address}: its reply has no choices: {str(reply)[:200]}") from e


def _post(address: str, body: dict) -> dict:
    """Sends JSON and returns the JSON of the reply; tries again after errors that may pass."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for tried in range(_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as e:
            failure, passing = f"HTTP {e.code} {e.reason}", e.code in _PASSING
        except (OSError, ValueError) as e:
            failure, passing = str(e), True
        if not passing:
            break
        if tried + 1 < _TRIES:
            time.sleep(2**tried)
    raise UserError(
        f"--model={address}: {failure}. Finished shards are kept: run the same command again"
    )
