"""Decides by captions, scores and nudenet whether an item passes."""

from __future__ import annotations

import functools

import numpy as np
import py3langid
from PIL import Image

from data_pipelines.common import Skip
from data_pipelines.ingestion.items import Caption, Item, printable
from data_pipelines.ingestion.options import Options
from imagen_jax.common.errors import UserError

# The classes of nudenet that reject an image.
UNSAFE = (
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)


def check_languages(languages: tuple[str, ...]) -> None:
    """Raises a UserError if a language is unknown."""
    known = {code for code, _ in py3langid.rank("")} if languages else set()
    if unknown := set(languages) - known:
        allowed = ", ".join(sorted(known))
        raise UserError(f"--languages has {min(unknown)!r}; allowed: {allowed}")


def check_detector(options: Options) -> None:
    """Raises a UserError if --detect_unsafe has no limit or no nudenet."""
    if options.detect_unsafe and options.max_unsafe >= 1:
        raise UserError(
            f"--max_unsafe={options.max_unsafe:g} keeps all images; set it below 1 for "
            "--detect_unsafe"
        )
    if options.detect_unsafe:
        detector()


@functools.cache
def detector():
    """Returns nudenet's detector, one for each process.

    Raises:
      UserError: nudenet is not installed.
    """
    try:
        import nudenet  # never a dependency: its license is unclear
    except ModuleNotFoundError as e:
        raise UserError(
            "--detect_unsafe needs nudenet: pip install nudenet (read about its license in "
            "docs/data.md)"
        ) from e
    return nudenet.NudeDetector()


def language(text: str) -> str:
    """Returns the code of the most likely language."""
    return py3langid.classify(text)[0]


@functools.cache
def token_limit(encoder: str, max_tokens: int):
    """Returns the encoder's token limit, without loading its weights; None without an encoder."""
    if not encoder:
        return None
    from imagen_jax.text import load_token_limit  # imports JAX

    return load_token_limit(encoder, max_tokens)


def by_scores(item: Item, options: Options) -> Skip | None:
    """Returns why the scores of an item reject it; a missing score passes."""
    limits = (
        ("pwatermark", "max_watermark", 1),
        ("punsafe", "max_unsafe", 1),
        ("similarity", "min_similarity", -1),
    )
    for score, flag, sign in limits:
        value, limit = item.scores.get(score), getattr(options, flag)
        if value is not None and sign * value > sign * limit and limit != sign:
            return Skip(item.id, f"{score} beyond --{flag}={limit:g}", f"{value:g}")
    return None


def by_detector(item: Item, image: Image.Image, options: Options) -> Skip | None:
    """Returns why nudenet rejects an RGB image; one with a score `punsafe` passes unseen."""
    if not options.detect_unsafe or "punsafe" in item.scores:
        return None
    bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # the order of OpenCV
    found = [(part["score"], part["class"]) for part in detector().detect(bgr)]
    score, name = max((pair for pair in found if pair[1] in UNSAFE), default=(0, ""))
    if score > options.max_unsafe:
        reason = f"nudenet beyond --max_unsafe={options.max_unsafe:g}"
        return Skip(item.id, reason, f"{name} {score:.2f}")
    return None


def by_captions(
    item: Item, options: Options
) -> tuple[list[tuple[Caption, str]], list[Skip]] | Skip:
    """Returns the usable captions with their languages, and the changes; or why none is."""
    usable, changes, refused = [], [], None
    limit = token_limit(options.encoder, options.max_tokens)
    for caption in item.captions:
        text, code = caption.text, language(caption.text)
        if printable(text) != text:
            refused = Skip(item.id, "caption not UTF-8", printable(text)[:100])
        elif len(text) < options.min_caption_length:
            reason = f"caption below --min_caption_length={options.min_caption_length}"
            refused = Skip(item.id, reason, text)
        elif 0 < options.max_caption_length < len(text):
            reason = f"caption beyond --max_caption_length={options.max_caption_length}"
            refused = Skip(item.id, reason, text[:100])
        elif options.languages and code not in options.languages:
            reason = f"caption not in --languages={','.join(options.languages)}"
            refused = Skip(item.id, reason, f"{code}: {text[:100]}")
        elif limit and (tokens := limit.num_tokens(text)) > options.max_tokens:
            if options.truncate_captions:
                changes.append(Skip(item.id, "caption truncated", f"{tokens} tokens"))
                usable.append((caption._replace(text=limit.truncate(text)), code))
            else:
                reason = f"caption longer than --max_tokens={options.max_tokens}"
                refused = Skip(item.id, reason, f"{tokens} tokens")
        else:
            usable.append((caption, code))
    if refused and usable:
        changes.append(Skip(item.id, f"one of the captions: {refused.reason}", refused.detail))
    return (usable, changes) if usable else refused
