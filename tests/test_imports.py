"""The import rule: CLIs -> experiment -> middle -> leaves, and one owner for each heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLIS = {"train", "evaluate", "sample", "plan", "export"}
MIDDLE = {"train_step", "cascade", "run_config", "actions"}
# Used by everyone: the error type, typed config sections, whole files, the wrapper of CLIs.
COMMON = {"errors", "config", "cli", "files"}
ALLOWED_SIBLINGS = {
    "diffusion": {"weightings"},
    "sampling": {"diffusion", "guidance", "solvers"},
    "guidance": {"diffusion"},
    "solvers": {"diffusion"},
    "editing": {"diffusion", "sampling"},
    "train_step": {"optim"},
    "metrics": {"topologies", "train_step"},
    "data": {"run_config", "topologies"},
    "cli": {"compilation"},
    "distributed": {"rendezvous"},
    "fits": {"sharding"},
    "planning.figures": {"topologies"},
    "planning.roofline": {"topologies"},
    "report": {"pictures"},
    "models.layers": {"models.attention"},
    "models.efficient_unet": {"models.layers", "models.network"},
    "models.network": {"models.layers"},
    "models.unet": {"models.layers", "models.network"},
}
OWNERS = {
    "tensorflow": {"data", "data_pipelines"},
    "seqio": {"data", "data_pipelines"},
    "tensorflow_datasets": {"data", "data_pipelines"},
    "orbax": {"checkpoint", "export"},
    "flax": {"models", "text", "data_pipelines.pretrain_text"},
    "jax.sharding": {"sharding"},
    "apache_beam": {"data_pipelines.encode_text_beam"},
    "pyarrow": {"data_pipelines.caption_lists"},
    "tensorstore": {"text.t5x_format"},
    "tokenizers": {"text.tokenizer"},
    "sentencepiece": {"text.tokenizer"},
    "torch": set(),
    "transformers": set(),
    "clu": {"metrics"},
    "ml_collections": {"configs", *CLIS},
}


def modules():
    for folder in ("imagen_jax", "data_pipelines", "configs", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removeprefix("imagen_jax.").removesuffix(".__init__"), path


def imports(path):
    """Every module that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path, name):
    """The modules of imagen_jax that a file imports, without the package's name."""
    known = {n for n, _ in modules()}
    found = (i.removeprefix("imagen_jax.") for i in imports(path) if i.startswith("imagen_jax."))
    return {i for i in found if i in known} - {name}


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[n for n, _ in modules()])
def test_imports_point_downwards(name, path):
    used = ours(path, name) - COMMON
    assert not used & CLIS, "nobody imports a CLI"
    if name in CLIS:
        return
    if name.startswith("data_pipelines"):
        assert not used & {"experiment", "run_config", "train_step"}
        return
    if name == "experiment":
        return
    assert "experiment" not in used
    if name in MIDDLE:
        return
    package = name.split(".")[0]
    siblings = {u for u in used if u.split(".")[0] != package or package == "models"}
    assert siblings <= ALLOWED_SIBLINGS.get(name, set()), f"{name} imports {siblings}"


@pytest.mark.parametrize("library", OWNERS)
def test_each_heavy_library_has_one_owner(library):
    for name, path in modules():
        owned = any(name == o or name.startswith(o + ".") for o in OWNERS[library])
        used = {i for i in imports(path) if i == library or i.startswith(library + ".")}
        assert owned or not used, f"{name} imports {sorted(used)}"


def test_experiment_needs_no_tensorflow():
    code = (
        "import sys, imagen_jax.experiment, imagen_jax.text; "
        "print(sorted(m for m in ('tensorflow', 'seqio', 'clu') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
