"""Asks a vision model about an image, over an HTTP endpoint of OpenAI's kind."""

from __future__ import annotations

import io
import json
import os
import time
import urllib.error
import urllib.request

from PIL import Image

from imagen_jax.common.errors import UserError
from imagen_jax.common.html import data_url

_TRIES = 4
_TIMEOUT = 120  # seconds
_PASSING = (408, 409, 429, 500, 502, 503, 504)  # HTTP errors that may pass


def encode(image: Image.Image, kind: str) -> bytes:
    """Encodes an image as "jpeg", at quality 95, or as "png"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return buffer.getvalue()


def ask(
    address: str,
    model: str,
    text: str,
    image: bytes,
    kind: str = "jpeg",
    *,
    flag: str = "model",
    advice: str = "run the same command again",
    max_tokens: int = 256,
) -> str:
    """Returns the reply of a model to a text and an image; "" if it is empty.

    The endpoint's key comes from the environment variable OPENAI_API_KEY.

    Args:
      address: the endpoint, which has /chat/completions.
      model: the endpoint's name of the model.
      image: encoded, as `kind`.
      flag: the flag that has the address.
      advice: what to do after an error.

    Raises:
      UserError: the endpoint cannot be reached, refuses, or its reply is not of OpenAI's kind.
    """
    content = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_url(kind, image)}},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "seed": 0,
        "max_tokens": max_tokens,
    }
    address = address.rstrip("/")
    where = f"--{flag}={address}"
    reply = _post(f"{address}/chat/completions", body, where, advice)
    try:
        return reply["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as e:
        raise UserError(f"{where}: its reply has no choices: {str(reply)[:200]}") from e


def _post(address: str, body: dict, where: str, advice: str) -> dict:
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
    raise UserError(f"{where}: {failure}. {advice}")
