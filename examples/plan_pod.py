# %% [markdown]
# # Embed captions, plan a pod run, check it
#
# A pod run reads captions that were embedded once, because T5-XXL is larger than the U-Nets. Before
# anything is rented, the plan says whether the run fits and how long it takes, and the launch check
# looks for mistakes that cost money.
#
#     pip install -e ".[plan]"
#     python examples/plan_pod.py

# %%
import json
import os
import pathlib
import subprocess
import sys

WORK = pathlib.Path(os.environ.get("OUT", "plan_pod"))
WORK.mkdir(parents=True, exist_ok=True)


def run(module: str, *args: str) -> None:
    """Runs a command of the project, as `python -m module args` does in a terminal."""
    print("python -m", module, *args, flush=True)
    subprocess.run([sys.executable, "-m", module, *args], check=True)


# %% [markdown]
# The store holds one embedding per caption, joined to the images by the caption's hash. Here the
# bundled encoder stands in for T5-XXL: `--encoder=/models/t5-v1_1-xxl` takes its place.

# %%
captions = WORK / "captions.txt"
captions.write_text("a red circle\na blue star above a green ring\n")
run(
    "data_pipelines.encode_text",
    f"--out={WORK / 'store'}",
    "--encoder=byte-tiny",
    "--max_tokens=64",
    f"--captions={captions}",
)

# %% [markdown]
# The plan compiles the training step with XLA's compiler for the chips, on this machine. `--fast`
# takes a few minutes for the small transformer; without it the predicted time is more accurate.

# %%
CONFIG = os.environ.get("CONFIG", "configs/transformer64.py:300m,v4-128")
run("imagen_jax.plan", f"--config={CONFIG}", "--fast", f"--out={WORK / 'plan'}")
plan = json.loads((WORK / "plan" / "plan.json").read_text())
print(f"memory {plan['memory']}", f"pace {plan['pace']}", sep="\n")

# %%
run(
    "launch.check",
    "--name=pod",
    "--zone=us-central2-b",
    "--type=v4-128",
    "--",
    f"--config={CONFIG}",
    "--workdir=/mnt/share/run",
    "--config.data.dir=/mnt/share/data",
)
