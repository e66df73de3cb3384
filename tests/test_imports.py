"""Imports inside the package run one way: every one is read, also lazy ones and those for type checkers only."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "allinone_ds"

LAYERS = (
    ("cli", "train", "bandwidth"),
    ("commands",),
    ("followed_run",),
    ("training",),
    ("export",),
    ("reporting",),
    ("planning",),
    ("init",),
    ("evaluation",),
    ("run_config",),
    ("run_folder",),
    ("model",),
    ("tasks",),
    ("balance",),
    ("zero",),
    ("models",),
    ("data",),
    ("machine",),
    ("testing",),
    ("distributed",),
    ("strict",),
    ("errors", "_lazy", "device_constants", "atomic_file"),
)
"""From top to bottom; a module imports its own folder and what stands below it."""
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, text: str) -> set[str]:
    """Modules of the package that a module's text imports, anywhere in it; of a package the part that is named."""
    found = set()
    package = module if FILES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_names":
            names = [ast.literal_eval(key) for key in node.args[1].keys]  # type: ignore[attr-defined]
            found |= {f"{PACKAGE.name}{n[1:]}" if n.startswith("..") else f"{package}.{n}" for n in names}
    return {name for name in found if name.partition(".")[0] == PACKAGE.name} - {module}


def layer(module: str) -> int:
    return LAYER_OF[module.split(".")[1]]


def upward(module: str, text: str) -> list[str]:
    """Imports of a module that its layer does not allow."""
    if module == PACKAGE.name:  # lists public names of every layer
        return []
    own = module.split(".")[1]
    return [
        name
        for name in sorted(imports_of(module, text))
        if name == PACKAGE.name or (name.split(".")[1] != own and layer(name) <= layer(module))
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    assert upward(module, FILES[module].read_text()) == []


def test_no_import_runs_in_a_circle() -> None:
    assert circle({module: imports_of(module, file.read_text()) for module, file in FILES.items()}) == []


def test_every_module_has_a_layer() -> None:
    top = {module.split(".")[1] for module in FILES if module != PACKAGE.name}
    assert top == set(LAYER_OF)


def test_only_zero_and_testing_import_deepspeed() -> None:
    for module, file in FILES.items():
        names = {
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        if any(name.split(".")[0] == "deepspeed" for name in names):
            assert module.split(".")[1] in ("zero", "testing"), f"{module} imports deepspeed; call allinone_ds.zero"


@pytest.mark.parametrize(
    "line",
    [
        "from allinone_ds.training.trainer import AllInOneTrainer",
        "if TYPE_CHECKING:\n    from allinone_ds.training.trainer import AllInOneTrainer",
        "def f():\n    from ..training import trainer",
        "import allinone_ds.cli",
        "import allinone_ds",
    ],
)
def test_an_upward_import_is_seen_wherever_it_stands(line: str) -> None:
    assert upward("allinone_ds.balance.report", line)


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_files_and_folders_stay_small() -> None:
    long = {module: len(file.read_text().splitlines()) for module, file in FILES.items()}
    assert {module: lines for module, lines in long.items() if lines > 400} == {}
    folders = {folder for folder in PACKAGE.rglob("*") if folder.is_dir() and folder.name != "__pycache__"}
    full = {str(f.relative_to(PACKAGE)): sum(p.is_file() for p in f.iterdir()) for f in folders}
    assert {folder: count for folder, count in full.items() if count > 14} == {}
