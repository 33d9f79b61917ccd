"""The import rule: who may import whom, and which room owns each heavy library.

A room is a folder or a loose module of imagen_jax, or a folder of data_pipelines.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).parents if (p / "setup.py").exists())

# Nobody imports a command: flags and wiring only.
COMMANDS = {
    "imagen_jax": {
        *("train", "sample", "evaluate", "demo", "plan"),
        *("pretrain_text", "verify", "export", "rate"),
    },
    "data_pipelines": {
        *("emoji", "encode_text", "encode_text_beam"),
        *("ingest", "ingest_beam", "recaption"),
        *("index_tars", "inspect"),
    },
    "launch": {"local", "status", "check"},
}
# A room imports itself and the layers below its own.
LAYERS = {
    "imagen_jax": (
        COMMANDS["imagen_jax"],
        {"training", "pipeline", "evaluation", "planning", "web", "exporting"},
        {"stage"},
        {"runs"},
        {"config"},
        {"sections"},
        {"diffusion", "models", "text", "formats", "devices", "optim", "ema"},
        {"common", "released"},
    ),
    "data_pipelines": (
        COMMANDS["data_pipelines"],
        {"reading", "ingestion"},
        {"scenes", "embeddings"},
        {"records"},
        {"common"},
    ),
}
# Imports allowed within a layer, with the reason.
EXCEPTIONS = {
    ("planning", "training"): "the plan compiles the program that training runs",
    ("evaluation", "pipeline"): "evaluation samples as users do",
    ("web", "pipeline"): "the drawing page samples as users do",
    ("exporting", "pipeline"): "the stages to export are those of a cascade that samples",
    ("text", "formats"): "an encoder's weights are tensors in files",
}
# Rooms of imagen_jax that data_pipelines may import. Only commands import data_pipelines.
FOR_DATA = {
    "config",
    "sections",
    "common",
    "text",
    "devices",
    "diffusion",
    "models",
    "formats",
    "optim",
}
OWNERS = {
    "tensorflow": {"data_pipelines"},
    "seqio": {"data_pipelines"},
    "tensorflow_datasets": {"data_pipelines"},
    "apache_beam": {"data_pipelines.encode_text_beam", "data_pipelines.ingestion"},
    "pyarrow": {"data_pipelines.embeddings", "data_pipelines.ingestion"},
    "flax": {
        *("imagen_jax.models", "imagen_jax.text", "imagen_jax.pretrain_text"),
        "imagen_jax.evaluation.networks",
    },
    "orbax": {"imagen_jax.runs"},
    "jax.sharding": {"imagen_jax.devices"},
    "clu": {"imagen_jax.training"},
    "starlette": {"imagen_jax.web", "imagen_jax.evaluation.rating"},
    "uvicorn": {"imagen_jax.web", "imagen_jax.evaluation.rating"},
    "tensorstore": {"imagen_jax.text"},
    "tokenizers": {"imagen_jax.text"},
    "sentencepiece": {"imagen_jax.text"},
    "ml_collections": {"configs"},
    "torch": set(),
    "transformers": set(),
}


@functools.cache
def modules():
    """Dotted name -> path of every module of the project except the tests."""
    folders = ("imagen_jax", "data_pipelines", "configs", "launch", "benchmarks")
    paths = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    return dict(zip((n.removesuffix(".__init__") for n in names), paths, strict=True))


@functools.cache
def imports(name):
    """Every module that a module imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name):
    """The modules of this project that a module imports, other than itself."""
    return (imports(name) & modules().keys()) - {name, "imagen_jax", "data_pipelines"}


def split(name):
    """A dotted name -> its package and its room."""
    package, _, rest = name.partition(".")
    return package, rest.partition(".")[0]


def floor(package, room):
    return next(i for i, layer in enumerate(LAYERS[package]) if room in layer)


def is_command(package, room):
    return room in COMMANDS.get(package, ())


@pytest.mark.parametrize("name", modules())
def test_nobody_imports_a_command(name):
    commands = {i for i in ours(name) if is_command(*split(i))}
    assert not commands, f"{name} imports {commands}"


@pytest.mark.parametrize("name", [n for n in modules() if split(n)[0] in LAYERS and split(n)[1]])
def test_imports_point_down(name):
    package, room = split(name)
    for other in ours(name):
        there, used = split(other)
        if there == package and used != room and (room, used) not in EXCEPTIONS:
            assert floor(package, used) > floor(package, room), f"{name} imports {other}"
        if there != package and package == "data_pipelines":
            assert used in FOR_DATA, f"{name} imports {other}"
        if there != package and package == "imagen_jax":
            assert is_command(package, room), f"{name} imports {other}; only commands may"


@pytest.mark.parametrize("library", OWNERS)
def test_each_heavy_library_has_one_owner(library):
    for name in (n for n in modules() if split(n)[0] != "benchmarks"):
        owned = any(name == o or name.startswith(o + ".") for o in OWNERS[library])
        used = {i for i in imports(name) if i == library or i.startswith(library + ".")}
        assert owned or not used, f"{name} imports {sorted(used)}"


@pytest.mark.parametrize(
    "module", ["imagen_jax", "imagen_jax.stage", "imagen_jax.training.experiment"]
)
def test_a_stage_needs_no_tensorflow(module):
    code = (
        f"import sys, {module}, imagen_jax.text; "
        "print(sorted(m for m in ('tensorflow', 'seqio', 'clu') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
