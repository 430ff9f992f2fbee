"""Benchmarks that nobody runs rot: each shows its help and, where that takes a minute at most, runs at its smallest."""

import csv
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import processes

FOLDER = Path(__file__).parents[2] / "benchmarks"
LEAST = "dataset.max_train_rows=16 unrelated=none tracking.plan=false"
RUN_HERE = {
    "bench": (f"--model tiny_llama --peers plain --rounds 1 --steps 2 {LEAST}", r"peak memory, MiB\n +qlora-exp"),
    "compatibility": ("ia3 --bases plain --families gpt2 --check", r"IA3 plain unchanged\ngpt2 unchanged"),
    "fuzz": ("0.03 --kinds config", r"config +│ \d+ +│ \d+ +│ 0 "),
    "measured_h100": ("--runs 1", r"the default run .*%"),
    "planned_memory": ("lora --model tiny_llama --batches 2", r"lora batch 2 checkpointing .*%"),
    "published_fms": ("--runs 1", r"SantaCoder .*%"),
    "published_fsdp": ("--runs 1", r"Llama 2 7B LoRA .*%"),
    "published_litgpt": ("--runs 1", r"llama2_7b .*%"),
    "published_times": ("--runs 1", r"SantaCoder .*%"),
    "sweeps": ("--jobs 0 --many 0 --done 2 --fused 0", r"sweep with all 2 jobs already done"),
}
"""Benchmark, arguments of its smallest run, and what that prints."""
PARTS = {"peers", "plain", "published_table", "team_facts", "team_servers"}
"""What other benchmarks consist of."""
OTHERS = sorted({file.stem for file in FOLDER.glob("*.py")} - {*RUN_HERE, *PARTS, "published_memory"})
PEFT_RUN = {
    "record": "lora--llama-3.2-3B-rank32",
    "peft_type": "LORA",
    "settings": '{"r": 32, "target_modules": ["q_proj", "v_proj"]}',
    "reserved_p99_gib": "20",
}

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a benchmark in an empty folder and give what it printed; in processes that have its imports already."""
    monkeypatch.syspath_prepend(FOLDER)
    processes.python_in_forks(monkeypatch, tmp_path.with_suffix(".forked"))

    def start(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                pytest.fail(str(end.code))
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("name", OTHERS)
def test_benchmark_that_takes_too_long_here_shows_its_help(name: str, run, tmp_path: Path):
    shown = run(name, "--help")
    assert "usage:" in shown
    assert re.search(r"nox -s \w+", shown)
    assert not list(tmp_path.iterdir())


def _thorough(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.thorough) if name in names else name for name in RUN_HERE]


@pytest.mark.parametrize(
    "name",
    _thorough(
        (
            "bench",
            "compatibility",
            "measured_h100",
            "planned_memory",
            "published_fms",
            "published_fsdp",
            "published_times",
            "sweeps",
        )
    ),
)
def test_benchmark_runs_at_its_smallest_size(name: str, run):
    arguments, shown = RUN_HERE[name]
    assert re.search(shown, run(name, *arguments.split()))


def test_published_memory_reads_a_table(run, tmp_path: Path):
    with (tmp_path / "published.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [*PEFT_RUN])
        table.writeheader()
        table.writerow(PEFT_RUN)
    assert PEFT_RUN["record"] in run("published_memory", "published.csv", "--length", "300")
