"""Pages of docs/reference are of today's code."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from qlora_exp.cli.main import make_parser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reference"
PACKAGE = [*(ROOT / "qlora_exp").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "benchmarks" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.pages()


def test_generated_pages_are_up_to_date(pages):
    """If this fails, run `nox -s reference`."""
    assert [name for name, text in pages.items() if (FOLDER / f"{name}.md").read_text("utf-8") != text] == []


def test_every_command_is_on_its_page(pages):
    assert [name for name in make_parser()[1].choices if f"### {name}\n" not in pages["commands"]] == []


def test_environment_variables_that_the_code_names_are_on_the_page():
    page = (FOLDER / "environment.md").read_text("utf-8")
    prefixes = "CUDA|DS|HF|LOCAL|MASTER|MLFLOW|OMP|PYTORCH|QLORA_EXP|RANK|RAY|SLURM|TOKENIZERS|TORCH|TORCHELASTIC|WORLD"
    name = re.compile(rf"[\"'`]((?:(?:{prefixes})_[A-Z_]+)|CXX|RANK|WORLD_SIZE)[\"'`]")
    text = "".join(file.read_text("utf-8") for file in PACKAGE)
    read = {*name.findall(text), *re.findall(r"environ(?:\.get)?[\[(][\"']([A-Z_]+)", text)}
    assert len(read) > 20
    assert sorted(read - {*re.findall(r"`([A-Z_]+)`", page)}) == []


def patterns(page: str) -> list[re.Pattern[str]]:
    """Return an expression for each name in the first column of the page's tables; parts in capitals stand for any."""
    cells = re.findall(r"^\| (`.*?) \|", (FOLDER / page).read_text("utf-8"), re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    texts = [re.sub(r"\b[A-Z]{4,}\b|(?<=[/-])N\b|(?<=rank)N", "[^/]+", re.escape(name)) for name in names]
    return [re.compile(text.replace(re.escape("..."), ".+") + (".*" if text.endswith("/") else "")) for text in texts]


def missing(found: set[str], page: str) -> list[str]:
    return sorted(name for name in found if not any(pattern.fullmatch(name) for pattern in patterns(page)))


def test_files_and_metrics_of_a_run_are_on_their_pages(run_quick):
    result = run_quick("training.save_strategy=steps", "training.save_steps=1", "unrelated=python_docs",
                       "unrelated.max_eval_rows=1", "evaluation.generate_rows=1", "training.eval_strategy=steps",
                       "training.eval_steps=1")  # fmt: skip
    lines = map(json.loads, (result.output_dir / "journal.jsonl").read_text("utf-8").splitlines())
    metrics = {name for line in lines if line["op"] == "metrics" for name in line["values"]}
    assert len(metrics) > 60
    assert missing(metrics, "metrics.md") == []
    written = {
        file.relative_to(result.output_dir).as_posix() for file in result.output_dir.rglob("*") if file.is_file()
    }
    assert len(written) > 20
    assert missing(written, "files.md") == []


def test_pages_would_miss_what_they_lack():
    assert missing({"after/loss", "after/lm_eval/mmlu/acc", "memory/rank3/steady/rss_peak_mib"}, "metrics.md") == []
    assert missing({"after/loss_of_mine", "memory"}, "metrics.md") == ["after/loss_of_mine", "memory"]
    assert missing({"checkpoints/checkpoint-2/optimizer.pt", "secrets.txt"}, "files.md") == ["secrets.txt"]
