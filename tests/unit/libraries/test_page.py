"""docs/reference/library_patches.md lists every use of libraries' private parts; outside its room there is none."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "qlora_exp"
LIBRARIES = PACKAGE / "libraries"
PAGE = (ROOT / "docs" / "reference" / "library_patches.md").read_text("utf-8")
DISTRIBUTIONS = {"hydra": "hydra-core"}
MODULES = sorted(file.stem for file in LIBRARIES.glob("*.py") if file.stem not in ("__init__", "patching", "imports"))
PUBLIC = {"_exit", "_current_frames"}
"""Of Python's `os` and `sys`, documented."""


def rows(heading: str) -> list[list[str]]:
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    lines = [line for line in section[1].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


ELSEWHERE = {
    (in_code(file)[0], name) for file, names, *_ in rows("Outside `qlora_exp/libraries`") for name in in_code(names)
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def touches(tree: ast.Module) -> Iterator[str]:
    """Private names of others that a module names: imported, taken of something that is not its own, or replaced."""
    nodes = [*ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id == "self"}  # fmt: skip
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    foreign = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            for alias in node.names:
                parts = [*module, *alias.name.split(".")]
                if parts[0] == "unittest":
                    yield "unittest"
                elif parts[0] not in ("qlora_exp", "sys", "__future__"):
                    foreign.add((alias.asname or alias.name).split(".")[0])
                    yield from filter(is_private, parts)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not (of_self and node.attr in own):
                yield node.attr
    for node in nodes:
        replaced = None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            replaced = node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "vars", "patched", "delattr"):
            replaced = node.args[0] if node.args else None
        while isinstance(replaced, ast.Attribute):
            replaced = replaced.value
        if isinstance(replaced, ast.Name) and replaced.id in foreign:
            yield f"{replaced.id} (replaced)"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from torch._subclasses import fake_tensor", ["_subclasses"]),
        ("from mlflow.store.db.utils import _initialize_tables", ["_initialize_tables"]),
        ("import hydra._internal.utils", ["_internal"]),
        ("from unittest import mock", ["unittest"]),
        ("import unittest.mock", ["unittest"]),
        ("def f(trial): return trial._trial_id", ["_trial_id"]),
        ("class A(B):\n def f(self): return super()._run_epoch()", ["_run_epoch"]),
        ("class A(B):\n def f(self): return self._inherited", ["_inherited"]),
        ("class A(B):\n def f(self): self._own = 1; return self._own", []),
        ("from trl.trainer import utils\nutils.switch = 1", ["utils (replaced)"]),
        ("import torch\ntorch.nn.functional.dropout = 1", ["torch (replaced)"]),
        ("import torch\nsetattr(torch.cuda, 'x', 1)", ["torch (replaced)"]),
        ("def f(model): model.config.use_cache = False", []),
        ("import sys\nsys.argv = []", []),
    ],
)
def test_the_search_finds_touches(code: str, expected: list[str]):
    assert [*touches(ast.parse(code))] == expected


def test_no_other_room_touches_private_parts_but_where_the_page_says():
    files = [file for file in [*PACKAGE.rglob("*.py"), *(ROOT / "hydra_plugins").glob("*.py")]
             if LIBRARIES not in file.parents]  # fmt: skip
    assert len(files) > 80
    found = {
        (str(file.relative_to(PACKAGE if PACKAGE in file.parents else ROOT)), name)
        for file in files
        for name in touches(ast.parse(file.read_text("utf-8")))
        if name not in PUBLIC
    }
    assert found - ELSEWHERE == set()
    for file, name in ELSEWHERE:
        assert name.split(".*")[0] in (PACKAGE / file).read_text("utf-8"), (file, name)


def test_private_hooks_that_classes_override_are_on_the_page():
    skipped = {"recipe/preload.py", "__main__.py"}  # to be run, not imported
    skipped |= set() if find_spec("galore_torch") else {"training/galore.py"}
    overridden = set()
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE)
        if str(path) in skipped or not any(
            isinstance(node, ast.ClassDef) and node.bases for node in ast.parse(file.read_text("utf-8")).body
        ):
            continue
        module = importlib.import_module(".".join(("qlora_exp", *path.with_suffix("").parts)))
        for owner in vars(module).values():
            if not inspect.isclass(owner) or owner.__module__ != module.__name__:
                continue
            others = [
                base for base in owner.__mro__[1:]
                if base.__module__.split(".")[0] not in ("qlora_exp", "builtins", "typing", "abc", "enum", "pydantic")
            ]  # fmt: skip
            overridden |= {
                (str(path), name)
                for name, value in vars(owner).items()
                if is_private(name)
                and callable(value)
                and any(name in vars(base) for base in others)
                and name != "_backward_cls"  # torch writes it into each autograd function
            }
    assert ("training/trainer.py", "_run_epoch") in overridden
    assert overridden <= ELSEWHERE


@pytest.mark.parametrize("library", MODULES)
def test_the_page_lists_what_a_module_offers_with_the_version_and_tests(library: str):
    distribution = DISTRIBUTIONS.get(library, library)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    listed = rows(f"{distribution} {pinned[distribution]}")
    tree = ast.parse((LIBRARIES / f"{library}.py").read_text("utf-8"))
    assert f" {pinned[distribution]}." in (ast.get_docstring(tree) or ""), "the docstring names another version"
    offered = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            offered.append(ast.unparse(target))
    assert sorted(name for name in offered if not is_private(name)) == sorted(in_code(row[1])[0] for row in listed)
    assert all(f"test_{library}.py" in row[3] for row in listed)


def test_the_pages_tests_are_there():
    for name in {one for line in PAGE.splitlines() if line.startswith("| ") for one in in_code(line.split("|")[4])}:
        if name.endswith(".py"):
            assert (ROOT / name if "/" in name else Path(__file__).with_name(name)).is_file(), name
