"""Folders of pictures to rate, small studies, and raters who answer by a known preference."""

import json
import random

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagen_jax.evaluation.rating import study

CATEGORIES = {"Colors": ("a red cube", "a blue cup"), "Text": ("a sign says hello", "an open book")}
PROMPTS = [prompt for prompts in CATEGORIES.values() for prompt in prompts]


def write_samples(folder, prompts=PROMPTS, num=8, size=16, color=(200, 80, 40)):
    """Writes a folder as imagen_jax.sample does; its pictures name their checkpoint."""
    folder.mkdir(parents=True)
    rng, listed = np.random.default_rng(len(folder.name)), []
    for i, (prompt, seed) in enumerate((p, s) for p in prompts for s in range(num)):
        pixels = np.clip(rng.normal(color, 30, (size, size, 3)), 0, 255).astype(np.uint8)
        info = PngInfo()
        info.add_text("request", f"checkpoint of {folder.name}")
        Image.fromarray(pixels).save(folder / f"{i:05d}.png", pnginfo=info)
        listed.append({"file": f"{i:05d}.png", "prompt": prompt, "seed": seed})
    (folder / "samples.json").write_text(json.dumps(listed))
    return folder


def write_references(folder, captions, size=24):
    """Writes a plain folder with one image per caption."""
    folder.mkdir(parents=True)
    for i in range(len(captions)):
        noise = np.random.default_rng(i).integers(0, 256, (size, size + 8, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i:03d}.png")
    (folder / "captions.txt").write_text("\n".join(captions))
    return folder


def write_categories(path):
    rows = [f"{p},{c}" for c, prompts in CATEGORIES.items() for p in prompts]
    path.write_text("\n".join(["Prompts,Category", *rows]))
    return path


def drawbench_study(root, raters=2, batches=2, names=("secretly-good", "secretly-bad"), **options):
    """A study of models whose names must stay secret; each rater gets all batches by default."""
    models = {name: write_samples(root / name, **options) for name in names}
    categories = write_categories(root / "drawbench.csv")
    num = options.get("num", 8)
    store = study.create(root / "study", "drawbench", models, categories=categories, samples=num)
    store.add_raters(raters, batches, 0)
    return store


def coco_study(root, raters=2, batches=1, pairs=200, num_captions=8):
    """A study of one model against references; no two captions share a word."""
    captions = ["a man on a bench", *(letter * 5 for letter in "abcdefghijklmnop")][:num_captions]
    model = write_samples(root / "secret", captions, num=1)
    references = write_references(root / "real", captions)
    store = study.create(
        root / "study", "coco", {"secret": model}, references=references, pairs=pairs
    )
    store.add_raters(raters, batches, 0)
    return store


def owners_shown(store):
    """rater -> for each position, the owners of what it shows, left to right, and the controls."""
    with store._connected() as db:
        rows = db.execute(
            "SELECT rater, owners, swapped, accepted FROM tasks JOIN trials ON trials.id = trial "
            "ORDER BY rater, position"
        ).fetchall()
    found = {}
    for rater, owners, swapped, accepted in rows:
        shown = json.loads(owners)[:: -1 if swapped else 1]
        found.setdefault(rater, []).append((shown, json.loads(accepted), bool(swapped)))
    return found


def answer_all(store, rater, choose):
    """Answers all trials of a rater.

    Args:
      choose: (question, owners from left to right, accepted answers, swapped) -> answer.
    """
    shown = owners_shown(store)[rater]
    for position, task in enumerate(store.tasks(rater)):
        questions = {"pair": ["quality", "alignment"]}.get(task["kind"], [task["kind"]])
        answers = {q: choose(q, *shown[position]) for q in questions}
        store.answer(rater, position, answers, 1.5)


def prefers(name, probability=1.0, seed=0):
    """A rater who takes the side of a model with some probability, and is right on controls."""
    rng = random.Random(seed)

    def choose(question, owners, accepted, swapped):
        if accepted:
            if accepted[0] in ("first", "second"):
                return "right" if swapped else "left"
            return accepted[0]
        if len(owners) == 1:
            return "yes" if owners[0] == "reference" else "somewhat"
        liked = rng.random() < probability
        return ("left", "right")[(owners[0] == name) != liked]

    return choose
