# %% [markdown]
# # Guidance and thresholding
#
# Guidance steers samples towards their prompt (section 2.2 of the paper). A large weight drives
# pixels out of range. Thresholding brings them back (section 2.3): static thresholding clips, and
# dynamic thresholding rescales the whole image first.
#
# This draws one prompt with the base model that ships with the package, at several weights and with
# each kind of thresholding. Run it as a script, or cell by cell in an editor that reads `# %%`:
#
#     python examples/guidance.py

# %%
import os
import pathlib

import numpy as np

import imagen_jax
from imagen_jax.common import pictures
from imagen_jax.released import SCENES

PROMPT = "a large green star on a navy background"
WEIGHTS = [1, 2, 4, 8]
THRESHOLDS = ["none", "static", "dynamic"]
NUM = int(os.environ.get("NUM", 4))  # samples of each setting
OUT = os.environ.get("OUT", "guidance.png")

pipe = imagen_jax.load(SCENES / "1_32")  # the cascade's first stage decides what is drawn

# %% [markdown]
# The same seeds start from the same noise, so differences come from the settings alone.

# %%
images, titles = [], []
for threshold in THRESHOLDS:
    for weight in WEIGHTS:
        drawn = pipe(PROMPT, num=NUM, seed=0, guidance=weight, threshold=threshold, progress=False)
        images.append(np.concatenate([np.asarray(image) for image in drawn], axis=1))
        titles.append(f"guidance {weight}, {threshold}")

# %% [markdown]
# How saturated are the images? Without thresholding, high weights push pixels to the ends of their
# range.

# %%
for title, row in zip(titles, images, strict=True):
    print(f"{title:24} {np.isin(row, (0, 255)).mean():6.1%} of values are 0 or 255")

sheet = pictures.grid(np.stack(images), titles, columns=len(WEIGHTS), side=96)
pictures.save(sheet, pathlib.Path(OUT))
print(OUT)
