"""The notebook of the tutorial has been run, names what exists, and runs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_exp
from qlora_exp.config.hydra_compose import compose

FILE = Path(__file__).parents[2] / "docs" / "tutorial" / "notebook.ipynb"
CELLS = [cell for cell in json.loads(FILE.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
CODE = ["".join(cell["source"]) for cell in CELLS]


def test_notebook_was_run_from_its_first_cell_to_its_last():
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    kinds = [{output["output_type"] for output in cell["outputs"]} for cell in CELLS]
    assert all("execute_result" in kind and kind <= {"execute_result", "stream"} for kind in kinds)


def test_notebook_has_nothing_of_the_machine_that_ran_it():
    text = FILE.read_text("utf-8")
    assert len(text) < 60_000
    assert "no comparison" not in text  # a sweep says so if it cannot compare its jobs
    assert re.findall(r"/(?:home|tmp|root|work|Users|dev/shm)/|\\u001b", text) == []


def test_names_and_overrides_of_the_notebook_exist():
    tree = ast.parse("\n".join(CODE))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "qlora_exp"
    }
    assert names <= {*qlora_exp.__all__}
    assert {"compose", "train", "curves", "sweep", "compare", "load"} <= names
    words = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.match(r"[a-z_.]+=", str(node.value))
    ]
    words = [word for word in words if " " not in word]
    assert len(words) > 10
    for word in words:
        key, _, values = word.partition("=")
        compose(["method=lora", *(f"{key}={value}" for value in values.split(",")[:1])])


@pytest.mark.thorough
def test_cells_run(tmp_path):
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(CODE), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(FILE.parents[2])}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([*(tmp_path / "multirun" / "scales").glob("*/journal.jsonl")]) == 4
