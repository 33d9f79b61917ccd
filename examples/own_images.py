# %% [markdown]
# # Train on your own images
#
# Any folder of images with captions does: `name.jpg` beside `name.txt`, img2dataset's tars, COCO, a
# Hugging Face image folder (docs/data.md). Set PHOTOS to yours. Without it, this script draws a
# small set of captioned scenes first.
#
#     PHOTOS=photos python examples/own_images.py

# %%
import json
import os
import pathlib
import subprocess
import sys

PHOTOS = os.environ.get("PHOTOS", "")
WORK = pathlib.Path(os.environ.get("OUT", "own_images"))
STEPS = int(os.environ.get("STEPS", 500))
WORK.mkdir(parents=True, exist_ok=True)


def run(module: str, *args: str) -> None:
    """Runs a command of the project, as `python -m module args` does in a terminal."""
    print("python -m", module, *args, flush=True)
    subprocess.run([sys.executable, "-m", module, *args], check=True)


if not PHOTOS:
    from PIL import Image

    from data_pipelines.scenes.draw import render
    from data_pipelines.scenes.grammar import nth_scene

    PHOTOS = WORK / "photos"
    PHOTOS.mkdir(exist_ok=True)
    for i in range(200):
        scene = nth_scene(i, "train", categories=("Simple",))
        Image.fromarray(render(scene, 96)).save(PHOTOS / f"{i:03d}.png")
        (PHOTOS / f"{i:03d}.txt").write_text(scene.caption)

# %% [markdown]
# Reading, filtering and embedding happen once. The data card shows what came in, what was left out
# and why: open `data/folder/1.0.0/card.html`.

# %%
data = WORK / "data"
run("data_pipelines.ingest", f"--source={PHOTOS}", f"--data_dir={data}", "--resolution=64")
manifest = json.loads((data / "folder/1.0.0/manifest.json").read_text())
print({split: files["records"] for split, files in manifest["splits"].items()})

# %% [markdown]
# Training continues from the last checkpoint if it is interrupted and started again. Two hundred
# images teach colors and rough shapes; thousands and more steps teach the rest.

# %%
run(
    "imagen_jax.train",
    "--config=configs/folder.py",
    f"--workdir={WORK / 'run'}",
    f"--config.data.dir={data}",
    f"--config.num_steps={STEPS}",
    f"--config.checkpoint_every={STEPS}",
    f"--config.sample_every={STEPS}",
    f"--config.eval_every={max(1, STEPS // 2)}",
)

# %%
run(
    "imagen_jax.sample",
    f"--workdir={WORK / 'run'}",
    f"--out={WORK / 'samples'}",
    "--prompts=a large red circle on a white background",
    f"--num={os.environ.get('NUM', 4)}",
)
