"""What is built from the checkout has what a run, a test or a citation needs."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--directory", str(folder)], cwd=ROOT, check=True)
    return folder


def below(*folders: str) -> set[str]:
    files = (file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file())
    return {file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts}


def test_wheel_has_the_package_and_its_options_and_nothing_else(built: Path):
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    options = {f"qlora_exp/{name}" for name in below("conf")}
    assert {name for name in names if ".dist-info/" not in name} == below("qlora_exp", "hydra_plugins") | options


def test_sdist_has_what_tests_and_docs_need(built: Path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "SECURITY.md",
        "CONTRIBUTING.md",
        "constraints.txt",
    }
    files |= {"noxfile.py", "mkdocs.yml", "pyproject.toml", ".ci/run", ".env.example", "docs/index.md"}
    assert files | below("qlora_exp", "conf", "tests", "benchmarks", "docs") <= names
    assert {name.partition("/")[0] for name in names} & {
        "site",
        "mlruns",
        "multirun",
        "outputs",
        ".venv",
        ".git",
    } == set()


def test_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["title"] == PROJECT["name"].replace("-", "_")
    assert {"cff-version", "message", "authors"} <= {*citation}


def test_issue_templates_are_forms():
    forms = [*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    for form in (yaml.safe_load(file.read_text("utf-8")) for file in forms if file.stem != "config"):
        assert {"name", "description", "body"} <= {*form}
    assert "qlora-exp doctor --json" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text("utf-8")
