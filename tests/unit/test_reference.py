"""docs/reference/: what is generated is up to date, and what is written by hand is complete."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import script

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
PAGES = ("keys.md", "peft_settings.md", "options.md", "commands.md")


@pytest.mark.parametrize("name", PAGES)
def test_generated_page_is_up_to_date(name: str):
    """If this fails: `nox -s reference`, and read the diff."""
    if problem := script("reference").stale(name):
        pytest.fail(problem, pytrace=False)


def test_stale_page_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reference = script("reference")
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(reference, "pages", lambda: {"keys.md": "# Keys\n\n| `seed` |\n"})
    assert "not up to date; run `nox -s reference` (line 1: # Keys)" in reference.stale("keys.md")  # no file yet
    for written, line in {"# Keys\n\n| `sed` |\n": "line 3: | `seed` |", "# Keys\n": "run `nox -s reference`"}.items():
        (tmp_path / "keys.md").write_text(written, "utf-8")
        assert line in reference.stale("keys.md")
    (tmp_path / "keys.md").write_text("# Keys\n\n| `seed` |\n", "utf-8")
    assert reference.stale("keys.md") == ""
    monkeypatch.setattr("sys.argv", ["reference.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        reference.main()
    assert ended.value.code is None


OTHER_WORDS = {
    "BAD_REQUEST", "CERTIFICATE_VERIFY_FAILED", "FP8_DYNAMIC", "INVALID_PARAMETER_VALUE", "OUT_OF_MEMORY", "PER_HOUR",
    "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "SC_OPEN_MAX", "STRICT_SPREAD",
}  # fmt: skip
"""Texts in capitals that are no environment variables."""


def first_cells(page: str) -> list[str]:
    """Code in the first cells of a page's tables."""
    rows = [line for line in (FOLDER / page).read_text("utf-8").splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall("`([^`]+)`", row.split(" | ")[0])]


def matching(names: list[str]) -> re.Pattern[str]:
    """Match what names describe in which words in capitals stand for something."""
    moments = [re.escape(name).replace("MOMENT", "(before|after)") for name in names]
    return re.compile("|".join(re.sub(r"[A-Z]{2,}|(?<=rank)N", "[^ /]+", name) for name in moments))


def variables_of_the_package() -> set[str]:
    """Names of environment variables: texts with capitals and underscores that are handed to `os.environ` or listed."""
    found = set()
    for file in sorted((FOLDER.parents[1] / "qlora_exp").rglob("*.py")):
        text = file.read_text("utf-8")
        if "environ" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {*re.findall(r"^(?:[A-Z][A-Z0-9]*_[A-Z0-9_]+|RANK|CXX)$", node.value)}
    return found - OTHER_WORDS


def test_every_environment_variable_is_on_the_page():
    text = (FOLDER / "environment.md").read_text("utf-8")
    used = variables_of_the_package()
    assert {"QLORA_EXP_CACHE", "SLURM_PROCID", "MLFLOW_TRACKING_URI", "HF_ENDPOINT"} <= used
    assert sorted(name for name in used if f"`{name}`" not in text) == []


def test_every_metric_of_a_run_is_on_the_page(shared_run: Callable[..., Any]):
    known = matching(first_cells("metrics.md"))
    messages = map(json.loads, (shared_run().output_dir / "journal.jsonl").read_text("utf-8").splitlines())
    logged = {name for message in messages if message["op"] == "metrics" for name in message["values"]}
    assert len(logged) > 50
    assert sorted(name for name in logged if not known.fullmatch(name)) == []


def test_every_file_of_a_run_is_on_the_page(shared_run: Callable[..., Any]):
    folder = shared_run().output_dir
    known = matching([name for name in first_cells("files.md") if not name.endswith("/")])
    files = {str(file.relative_to(folder)).removeprefix("model/") for file in folder.rglob("*") if file.is_file()}
    text = (FOLDER / "files.md").read_text("utf-8")
    assert "qlora_exp.yaml" in files
    missing = [name for name in files if not name.startswith("checkpoints/") and not known.fullmatch(name)]
    assert [name for name in missing if f"`{name}`" not in text] == []


def test_exit_codes_and_outcomes_are_on_the_page():
    from typing import get_args

    from qlora_exp.sweeps.jobs import NOT_FAILED, UNFINISHED, State

    names = {*first_cells("exit_codes.md")}
    assert {"0", "1", "2", "130"} <= names
    assert {*NOT_FAILED, *UNFINISHED, *get_args(State)} - {"new", "running", "damaged"} <= names
