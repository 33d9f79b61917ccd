"""README.md and docs/*.md name only links, files, commands, configs, flags and keys that exist."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("imagen_jax", "data_pipelines", "benchmarks", "launch", "configs")
# Files that the pages mention but the project lacks: the user's, and those of the recipes.
FOREIGN = {
    *("prompts.txt", "name.txt", "key.txt", "captions.txt", "emoji-test.txt", "vocab.txt"),
    "merges.txt",
}
RECIPES = {
    "data_pipelines/squares.py",
    "data_pipelines/ingestion/sources/embedded.py",
    "imagen_jax/models/convnet.py",
    "imagen_jax/evaluation/brightness.py",
}
SECTIONS = "data|text|model|mesh|optimizer|diffusion|sampling|init|checkpoint|ema|guard"

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = r"((?:imagen_jax|data_pipelines|benchmarks|launch)\.[a-z]\w*(?:\.\w+)*)"
# Arguments run to the end of the line, past a backslash, or to a closing backtick.
COMMAND = re.compile(rf"python3? -m {MODULE}((?:\\\n|[^\n`])*)")
FLAG = re.compile(r"--(?:no)?([a-z]\w*)(?=[=\s\"]|$)")
KEY_IN_COMMAND = re.compile(r"--config\.([a-z_.]+)=")
KEY_IN_TEXT = re.compile(
    rf"`(?:config\.)?((?:{SECTIONS})\.(?!py`|safetensors`)[a-z_]+)(?:=[^`]*)?`"
)
CONFIG = re.compile(r"--config=(configs/\w+\.py)(?::([\w,-]+))?")
PATH = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|yaml|txt))(?::[\w,-]+)?`")
CLASS = re.compile(r"`((?:[a-z_]\w*\.)+)([A-Z]\w+)`")


def cases(pattern):
    """Returns the matches of a pattern in the pages: one case per page and distinct match."""
    found = {
        (page.name, *(group or "" for group in match.groups()))
        for page in PAGES
        for match in pattern.finditer(page.read_text())
    }
    return sorted(found)


@functools.cache
def sources():
    """Path -> syntax tree of all code except the tests."""
    paths = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    return {path: ast.parse(path.read_text()) for path in paths}


@functools.cache
def files():
    """Every file of the project, relative to its root."""
    folders = [ROOT / name for name in (*PACKAGES, "docs", "tests", "examples")]
    found = [*ROOT.iterdir(), *(p for folder in folders for p in folder.rglob("*"))]
    return {p.relative_to(ROOT).as_posix() for p in found}


@functools.cache
def names(kind):
    """The typed fields, the functions or the words in string literals of all code."""
    nodes = [node for tree in sources().values() for node in ast.walk(tree)]
    if kind == "fields":
        return {
            n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and hasattr(n.target, "id")
        }
    if kind == "functions":
        return {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {s for s in strings if s.isidentifier()}


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page, module, arguments", cases(COMMAND))
def test_commands_and_their_flags_exist(page, module, arguments):
    path = ROOT.joinpath(*module.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if file.relative_to(ROOT).as_posix() in RECIPES:
        return
    assert file.exists(), f"no module {module}"
    assert '__name__ == "__main__"' in file.read_text(), f"{module} is not a command"
    unknown = [f for f in FLAG.findall(arguments) if f not in names("strings") | {"help"}]
    assert not unknown


@pytest.mark.parametrize("page, key", cases(KEY_IN_COMMAND) + cases(KEY_IN_TEXT))
def test_config_keys_exist(page, key):
    """The text also names functions, such as `optim.update_ema`."""
    assert key.rpartition(".")[2] in names("fields") | names("functions")


@pytest.mark.parametrize("page, path, argument", cases(CONFIG))
def test_configs_exist(page, path, argument):
    tree = sources()[ROOT / path]
    get_config = next(n for n in tree.body if getattr(n, "name", "") == "get_config")
    size = argument.partition(",")[0]
    if not size or re.fullmatch(r"v\d+[a-z]*-\d+", size):  # a topology is for the command
        return
    allowed = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert get_config.args.args and size in allowed


@pytest.mark.parametrize("page, path", cases(PATH))
def test_files_exist(page, path):
    """A path from the root, or the name of a file anywhere in the project."""
    assert path in FOREIGN | RECIPES or any(f"/{file}".endswith(f"/{path}") for file in files())


@pytest.mark.parametrize("page, module, name", cases(CLASS))
def test_classes_exist(page, module, name):
    package = module.split(".")[0]
    if package not in PACKAGES and importlib.util.find_spec(package):
        return  # the class of another library
    suffix = Path(*module.strip(".").split(".")).with_suffix(".py").parts
    trees = [tree for path, tree in sources().items() if path.parts[-len(suffix) :] == suffix]
    assert any(isinstance(n, ast.ClassDef) and n.name == name for t in trees for n in t.body)
