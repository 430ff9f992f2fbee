import re

import pytest
from helpers.planning import ARCHITECTURE
from support import exit_code

from qlora_exp.planning import advisor
from qlora_exp.planning.advisor import Sized
from qlora_exp.planning.gpus import Gpu
from qlora_exp.planning.tables import show_models


def plan(*arguments: str) -> int:
    return exit_code("plan", "model=tiny_llama", ARCHITECTURE, "training.max_length=64", *arguments)


@pytest.mark.slow
def test_plan_command_says_whether_a_run_fits(capsys: pytest.CaptureFixture[str]):
    assert plan("method=lora", "--gpu", "rtx4090", "training.max_steps=10", "--price", "0.5") == 0
    shown = capsys.readouterr().out
    assert "fits in 24 GiB (rtx4090)" in shown
    assert "for 10 steps" in shown
    assert "steady" in shown


def test_plan_command_says_what_goes_to_the_machines_memory(capsys: pytest.CaptureFixture[str]):
    assert plan("method=lora", "training=long_rows") == 0
    assert re.search(r"^offload +0\.0\d GiB of the machine's memory, pinned", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_plan_command_shows_a_line_for_each_run_of_a_sweep(capsys: pytest.CaptureFixture[str]):
    assert plan("method=lora,qlora", "quantization=none,quanto_int4", "--vram", "0.7") == 0
    shown = capsys.readouterr().out
    assert "4 runs" in shown
    assert "cannot be" in shown  # what Quanto stores
    assert "needs a" in shown  # qlora, of an unquantized base


@pytest.mark.slow
def test_plan_command_says_what_each_process_holds_and_sends(capsys: pytest.CaptureFixture[str]):
    shared = (
        "method=lora",
        "distributed=fsdp",
        "distributed.cpu_offload=true",
        "--gpu",
        "a100-80gb",
        "--bandwidth",
        "10",
    )
    assert plan(*shared, "distributed.num_processes=4") == 0
    shown = capsys.readouterr().out
    assert "MiB, of each of 4 processes" in shown
    assert "GiB of the machine's memory for each process" in shown
    assert re.search(r"sends +[\d.]+ GB by each process for a step, [\d.]+ of it weights; \S+ s at 10 GB/s", shown)
    assert "fits in 80 GiB (a100-80gb) with 1 GiB for the driver and NCCL" in shown
    assert plan(*shared, "distributed.num_processes=2,4") == 0
    assert "sends" in capsys.readouterr().out
    assert plan("--bandwidth", "0") == 1


def test_largest_model_for_each_card_is_shown(capsys):
    gib = 2**30
    models = [Sized("small", 10**9, {"LoRA": 2 * gib, "QLoRA": gib}), Sized("big", 10**10, {"QLoRA": 6 * gib})]
    show_models(models, {"third, LoRA": "no"}, advisor.cards(Gpu("GPU", 0.0)))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line] == [
        ["4", "1.0 B", "1.0 B"], ["6", "1.0 B", "1.0 B"],
        *([str(size), "1.0 B", "10.0 B"] for size in advisor.CARDS[2:]),
    ]  # fmt: skip
