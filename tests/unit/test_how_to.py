"""Pages for users and contributors name what there is: options in tables, and pages that the code sends readers to."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_exp.config.describe import entries, presets

ROOT = Path(__file__).parents[2]
ADDED = ("dataset", "key", "launcher", "method", "metric")
METHODS = (ROOT / "docs" / "how_to" / "methods.md").read_text("utf-8")


def sources() -> Iterator[Path]:
    for folder, kind in (("qlora_exp", "*.py"), ("qlora_exp", "*.json"), ("conf", "*.yaml"), ("benchmarks", "*.py")):
        yield from sorted((ROOT / folder).rglob(kind))


def pages_in(text: str) -> set[str]:
    """Return the pages of docs/ that a text names; longer addresses, such as llama.cpp's docs/gguf.md, are not ours."""
    return {*re.findall(r"(?<![\w./-])docs/(?:[\w-]+/)*[\w-]+\.\w+", text)}


@pytest.mark.parametrize("file", [*sources(), ROOT / "noxfile.py"], ids=lambda file: file.relative_to(ROOT).as_posix())
def test_pages_named_in_the_code_exist(file: Path):
    missing = [page for page in sorted(pages_in(file.read_text("utf-8"))) if not (ROOT / page).is_file()]
    assert not missing, f"{file.relative_to(ROOT)} names pages that do not exist: {', '.join(missing)}"


def test_pages_named_where_keys_are_explained_exist():
    """As `keys` prints them: pydantic puts the lines of a docstring together."""
    sections = [(kind.__doc__ or "") for kind in entries.sections().values() if kind]
    meanings = [entry.meaning for name in entries.sections() for entry in entries.of_section(name)]
    named = pages_in("\n".join([*sections, *meanings]))
    assert "docs/how_to/add_a_metric.md" in named
    assert sorted(page for page in named if not (ROOT / page).is_file()) == []


def test_every_variant_of_lora_is_in_the_table():
    table = METHODS.partition("## Variants of LoRA")[2].partition("\n## ")[0]
    named = {*re.findall("`(\\w+)`", "".join(line for line in table.splitlines() if line.startswith("| `")))}
    options = {*presets.options()["lora_variant"]} - {"lora"}
    assert not (missing := options - named), f"add to 'Variants of LoRA' in docs/how_to/methods.md: {sorted(missing)}"
    assert not (gone := named - options), f"no such option of lora_variant, in docs/how_to/methods.md: {sorted(gone)}"


def test_every_method_is_named():
    missing = [name for name in presets.options()["method"] if not re.search(rf"`(method=)?{name}`", METHODS)]
    assert not missing, f"name in docs/how_to/methods.md: {', '.join(missing)}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *(f"docs/how_to/add_a_{what}.md" for what in ADDED)])
def test_places_that_contributors_are_sent_to_exist(page: str):
    text = (ROOT / page).read_text("utf-8")
    files = {*re.findall(r"`((?:qlora_exp|tests|conf|docs|benchmarks)/[\w/]+\.\w+)`", text)}
    real = {file for file in files if not re.search("NAME|ROOM|MODULE", file)}
    assert sorted(file for file in real if not (ROOT / file).is_file()) == []
    named = re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", text)
    assert [(name, file) for name, file in named if name not in (ROOT / file).read_text("utf-8")] == []
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests] == []
