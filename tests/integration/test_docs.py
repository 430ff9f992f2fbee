"""What README and docs show is right: the site builds, links lead somewhere, commands and code are of today."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import qlora_exp
from qlora_exp.cli.main import _parse
from qlora_exp.planning.gpus import GPUS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Yield the code blocks of a page that are in one of these languages."""
    for language, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        if language in languages:
            yield block


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words after `qlora-exp` of each command on a page, in blocks and in sentences."""
    shown = [block.replace("\\\n", " ") for block in blocks(page, "bash", "console", "text")]
    lines = [line for block in shown for line in block.splitlines()]
    sentences = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`([^`\n]*qlora-exp [^`\n]+)`", sentences)
    for line in lines:
        named = re.search(r"(?:^|\s|/)qlora-exp ([a-z-].*)", line, re.DOTALL)
        if named and "[-h]" not in line:  # a usage
            words = shlex.split(named[1], comments=True)
            yield words[: min((words.index(sign) for sign in (">", "|") if sign in words), default=None)]


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


def test_site_builds_without_warnings(tmp_path: Path):
    # Not --quiet, which hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    warnings = [line for line in built.stderr.splitlines() if not line.startswith("INFO")]
    assert (built.returncode, warnings) == (0, [])
    text = (tmp_path / "site" / "security" / "index.html").read_text("utf-8")
    assert "trust_remote_code" in text


@each_page
def test_linked_files_exist(page: Path):
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text("utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@each_page
def test_nox_sessions_named_on_a_page_exist(page: Path):
    noxfile = (ROOT / "noxfile.py").read_text("utf-8")
    functions = re.findall(r"^def (\w+)\(session: nox.Session\)", noxfile, re.MULTILINE)
    sessions = {name.replace("_", "-") for name in functions}
    named = set(re.findall(r"\bnox -s ([a-z][\w-]*)", page.read_text("utf-8")))
    assert named - sessions == set()


@each_page
def test_commands_on_a_page_parse(page: Path, capsys: pytest.CaptureFixture[str]):
    refused = []
    for words in commands(page):
        try:
            gpu = getattr(_parse(words), "gpu", None)
        except SystemExit as ended:
            if ended.code:
                refused.append(capsys.readouterr().err)
        else:
            assert {*(gpu or "").split(",")} - {""} <= {*GPUS}
    assert refused == []


@each_page
def test_measured_figures_name_a_command(page: Path):
    begin, *sections = re.split(r"^(?=## )", page.read_text("utf-8"), flags=re.MULTILINE)
    command = r"nox -s |qlora-exp |python benchmarks/|pytest "
    for section in [begin, *sections]:
        has_figures = re.search(r"^\|.*\d\.\d", section, re.MULTILINE)
        assert not has_figures or re.search(command, begin + section), section.splitlines()[0]


def test_every_picture_is_shown():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [picture.name for picture in (ROOT / "docs" / "images").iterdir() if picture.name not in text] == []


@each_page
def test_python_blocks_compile_and_name_what_exists(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "qlora_exp":
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qlora_exp":
                assert node.attr in qlora_exp.__all__


@each_page
def test_data_blocks_can_be_read(page: Path):
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block) is not None
    for block in blocks(page, "toml"):
        assert tomllib.loads(block)
    for block in blocks(page, "json"):
        assert json.loads(block) is not None
