import re

import pytest
from helpers.planning import ARCHITECTURE
from support import exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning import advisor, tables
from qlora_exp.planning.advisor import Sized
from qlora_exp.planning.cost import Amount
from qlora_exp.planning.gpus import GPUS, Gpu
from qlora_exp.planning.planner import Prediction
from qlora_exp.planning.recording.fake_tensors import Work
from qlora_exp.planning.replay import Phase
from qlora_exp.planning.tables import Planned, show_models
from qlora_exp.utils.units import GIB


def plan(*arguments: str) -> int:
    return exit_code("plan", "model=tiny_llama", ARCHITECTURE, "training.max_length=64", *arguments)


@pytest.mark.slow
def test_plan_command_says_whether_a_run_fits(capsys: pytest.CaptureFixture[str]):
    assert plan("method=lora", "--gpu", "rtx4090", "training.max_steps=10", "--price", "0.5") == 0
    shown = capsys.readouterr().out
    assert "fits in 24 GiB (rtx4090)" in shown
    assert "h for 10 steps of 4 rows; training.max_steps" in shown
    assert re.search(r"^cost +\S+ at 0.5 per hour; \S+ per 1,000 examples", shown, re.MULTILINE)
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


def test_cards_are_compared_and_the_cheapest_that_fits_is_marked(capsys: pytest.CaptureFixture[str]):
    prediction = Prediction({"steady": Phase({}, 0, 20 * GIB)}, [Work(10**14, 0)], 1, 2)
    words = [["experiment=llama3_8b_alpaca_lora"], ["experiment=llama3_8b_alpaca_qlora"]]
    cards = [GPUS["t4"], GPUS["rtx4090"], GPUS["a100-80gb"]]
    amount = Amount(1000, 8000.0, "--rows")
    config = compose(["method=lora"])
    tuned = "per_device_train_batch_size=2: planned 20 GiB"
    runs = [Planned(words[0], config, prediction, card, amount, tuned) for card in cards]
    runs.append(Planned(words[1], None, None, cards[0], why="cannot be planned: no"))
    tables.show_many(runs, {"t4": 0.1, "rtx4090": 0.4, "a100-80gb": 2.0})
    shown = capsys.readouterr().out
    rows = {card.name: next(line for line in shown.splitlines() if f"│ {card.name} " in line) for card in cards}
    assert " no " in rows["t4"]
    assert "yes*" in rows["rtx4090"]
    assert "*" not in rows["a100-80gb"]
    assert all(word.partition("=")[2] in shown for (word,) in words)  # names are not cut at 80 columns
    assert "llama3_8b_alpaca_qlora: cannot be planned: no" in shown
    assert "llama3_8b_alpaca_lora t4: tuned to per_device_train_batch_size=2\n" in shown
    assert max(len(line) for line in shown.splitlines() if "│" in line) <= 80


def test_table_without_a_gpu_has_no_empty_column(capsys: pytest.CaptureFixture[str]):
    prediction = Prediction({"steady": Phase({}, 0, GIB)}, [], 1, 2)
    runs = [Planned([f"method={name}"], compose(["method=lora"]), prediction, Gpu("GPU", 0.0)) for name in "ab"]
    tables.show_many(runs, {})
    heading = capsys.readouterr().out.splitlines()[2]
    assert [cell.strip() for cell in heading.strip("┃").split("┃")] == ["method", "GiB"]


def test_what_to_give_is_said_where_hours_are_not_known(capsys: pytest.CaptureFixture[str]):
    prediction = Prediction({"steady": Phase({}, 0, GIB)}, [Work(10**14, 0)], 1, 2)
    run = Planned([], compose(["method=lora"]), prediction, GPUS["t4"], tables.UNASKED)
    assert run.bill(1.0) is None
    tables.show_many([run, run], {})
    assert "give --rows N" in capsys.readouterr().out


def test_run_that_a_limit_of_this_process_does_not_let_fit_is_told_what_would(monkeypatch, capsys):
    monkeypatch.setattr("qlora_exp.environment.memory.limits", lambda: {"group": 2**30})
    words = ["model=tiny_llama", "device=cpu", "method=lora", "training.per_device_train_batch_size=64"]
    assert exit_code("plan", *words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not fit in 1 GiB (" in shown
    assert "as its control group allows)" in shown
    assert "instead it should fit with training.per_device_train_batch_size=" in shown
