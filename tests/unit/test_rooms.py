"""How the package is laid out, beyond what the import contracts check."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import qlora_exp

PACKAGE = Path(qlora_exp.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(file.parent for file in PACKAGE.glob("*/__init__.py"))


def name_of(file: Path) -> str:
    return ".".join(("qlora_exp", *file.relative_to(PACKAGE).with_suffix("").parts))


def private_names_taken(file: Path) -> list[str]:
    """List the private names of other modules of the package that `file` imports or reaches through a module."""
    tree = ast.parse(file.read_text("utf-8"))
    taken, modules = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_exp"):
            taken += [f"{node.module}.{name.name}" for name in node.names if name.name.startswith("_")]
            modules |= {name.asname or name.name for name in node.names if is_module(f"{node.module}.{name.name}")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            taken += [f"{node.value.id}.{node.attr}"] if private else []
    return taken


def is_module(name: str) -> bool:
    return name in {name_of(file) for file in MODULES}


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_module_uses_no_private_name_of_another(file: Path):
    assert private_names_taken(file) == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_room_says_what_belongs_there_and_what_it_may_import(room: Path):
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text("utf-8"))) or ""
    first, *_, may_import, never_here = docstring.splitlines()
    assert first.endswith(".")
    assert may_import.startswith("May import: ")
    assert never_here.startswith("Never here: ")


def test_recipe_fits_on_a_page_and_nothing_is_too_long():
    lines = {name_of(file): len(file.read_text("utf-8").splitlines()) for file in MODULES}
    assert lines["qlora_exp.recipe.finetune"] <= 100
    assert {name: count for name, count in lines.items() if count > 400} == {}
    folders = Counter(file.parent for file in MODULES if file.name != "__init__.py")
    assert {folder.name: count for folder, count in folders.items() if count > 14} == {}
    functions = {
        f"{name_of(file)}.{node.name}": node.end_lineno - node.lineno + 1
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert {name: count for name, count in functions.items() if count > 80} == {}
