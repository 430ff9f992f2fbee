"""What is chosen for a goal fits, and the reason names what was weighed."""

from dataclasses import replace

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning.advisor import Fit, Option
from qlora_exp.planning.gpus import GPUS, Gpu
from qlora_exp.planning.guidance import knowledge
from qlora_exp.planning.guidance.choice import GOALS, Measured, choose, rated
from qlora_exp.planning.guidance.tables import show_card, show_cards
from qlora_exp.planning.planner import Prediction
from qlora_exp.planning.recording.fake_tensors import Work
from qlora_exp.planning.replay import Phase

CARD = Gpu("GPU", 24.0)
WORDS = {"LoRA": ["method=lora"], "QLoRA": ["method=qlora"], "DoRA": ["method=lora", "lora_variant=dora"]}


def option(name: str, gib: float, rows: int, length: int, flops: float = 1e12, gpu: Gpu = CARD) -> Option:
    size = int(gib * 2**30)
    planned = Prediction({"steady": Phase({"weights": size}, size, size)}, [Work(int(flops), 0)], 1, 2 * 10**9)
    words = WORDS.get(name, [f"method={name}"])
    return Option(name, compose(words), planned, {gpu: Fit(rows, length)}, words)


@pytest.mark.parametrize(
    ("lora", "qlora", "says"),
    [
        (
            (14, 6848),
            (39, 8192),
            "LoRA: it fits, so no accuracy is lost to 4-bit weights; QLoRA would take 7.0 GiB, not 18.0",
        ),
        ((2, 1024), (39, 8192), "; 2 rows fit in a batch, not 4"),
        ((0, 0), (39, 8192), "QLoRA: LoRA does not fit with one row of 512 tokens (it takes 18.0 GiB with 4)"),
        ((0, 0), (1, 512), "; 1 row fits in a batch, not 4"),
        ((0, 0), (0, 256), "with rows of at most 256 tokens"),
        ((0, 0), (0, 0), "none: not even QLoRA with one short row fits"),
    ],
)
def test_lora_is_chosen_if_it_fits(lora, qlora, says):
    chosen = choose([option("LoRA", 18, *lora), option("QLoRA", 7, *qlora)], CARD)
    assert says in f"{chosen.name}: {chosen.why}"


@pytest.mark.parametrize(
    ("more", "fit", "words"),
    [
        ([], (8, 512), ""),  # as configured
        ([], (3, 512), "per_device_train_batch_size=2 gradient_accumulation_steps=2 per_device_eval_batch_size=2"),
        (
            ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=3"],
            (3, 512),
            "per_device_train_batch_size=3 gradient_accumulation_steps=4 per_device_eval_batch_size=3",
        ),
        (
            ["training.max_length=600"],
            (0, 256),
            "max_length=256 per_device_train_batch_size=1 gradient_accumulation_steps=4 per_device_eval_batch_size=1",
        ),
    ],
)
def test_command_keeps_the_rows_of_a_step_and_fits(more, fit, words, monkeypatch):
    monkeypatch.setitem(WORDS, "QLoRA", ["method=qlora", *more])
    asked = choose([option("QLoRA", 7, *fit)], CARD).command
    kept = [word for word in more if word.partition("=")[0].partition(".")[2] not in words]
    assert asked == " ".join(["qlora-exp train method=qlora", *kept, *(f"training.{word}" for word in words.split())])
    before, after = (compose(given).training for given in (WORDS["QLoRA"], asked.split()[2:]))
    rows = [each.per_device_train_batch_size * each.gradient_accumulation_steps for each in (before, after)]
    assert rows[0] == rows[1]


def test_number_of_gpus_that_would_do_is_said():
    found = [option("LoRA", 80, 0, 0), option("QLoRA", 40, 0, 0)]
    for one, count in zip(found, (4, 2), strict=True):
        one.fits[CARD] = Fit(0, 0, count)
    assert "several of these with distributed=fsdp (4 for LoRA, 2 for QLoRA)" in choose(found, CARD).why


def test_time_of_4_bits_is_stated_for_gpus_with_rates():
    card = GPUS["rtx4090"]
    options = [option("LoRA", 18, 4, 512, 1e12, card), option("QLoRA", 7, 4, 512, 1.2e12, card)]
    assert "+20% time" in choose(options, card).why


def test_each_goal_weighs_what_it_names():
    options = [option("LoRA", 18, 8, 512, 5e12), option("QLoRA", 7, 8, 512, 9e12), option("ia3", 12, 8, 512, 2e12)]
    assert [choose(options, CARD, goal).name for goal in GOALS] == ["LoRA", "ia3", "QLoRA", "ia3"]
    assert "45.5 % solved" in choose(options, CARD, "speed").why
    assert choose([options[2], option("prompt_tuning", 11, 8, 512)], CARD).name == "ia3"
    nearly = option("LoRA", 18, 8, 512, 2.1e12)  # as fast, as far as plans can say, and better
    assert choose([nearly, options[2]], CARD, "speed").name == "LoRA"


def test_measured_runs_decide_and_ties_go_to_the_fastest():
    options = [option("LoRA", 18, 8, 512, 5e12), option("QLoRA", 7, 8, 512, 9e12), option("DoRA", 19, 8, 512, 7e12)]
    seen = {
        "QLoRA": Measured(2.0, ["a"], "", worse=False),
        "DoRA": Measured(2.01, ["b"], "tie +0.0100", worse=False),
        "LoRA": Measured(2.5, ["c"], "worse +0.5000", worse=True),
    }
    chosen = choose(options, CARD, "quality", seen)
    assert chosen.name == "DoRA"
    assert "do not tell it from QLoRA" in chosen.why
    assert choose(options[:2], CARD, "quality", seen).why.startswith("it has the lowest held-out loss")


def test_advice_is_readable_and_marked(capsys):
    options = [option("LoRA", 18, 8, 512, 5e12), option("QLoRA", 7, 8, 512, 9e12)]
    seen = {"LoRA": Measured(2.0, ["night-3"], "", worse=False)}
    show_card(options, {}, CARD, "quality", None, seen)
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if not line.startswith("command  ")) <= 80
    for text in (
        "(measured here)",
        "(published: ",
        "(rule of thumb)",
        "measured LoRA: night-3",
        knowledge.PAGE,
        "1.80 x",
    ):
        assert text in shown
    card = replace(GPUS["rtx4090"], memory_gib=12.0)
    for one in options:
        one.fits[card] = Fit(4, 512)
    show_card(options, {}, card, "cost", 0.5)
    shown = capsys.readouterr().out
    assert "cost" in shown
    assert "paged_adamw_8bit" in shown
    show_cards(options, {}, [CARD], "memory")
    assert "choose for memory" in capsys.readouterr().out


def test_kinds_and_rates():
    assert knowledge.kind(compose(["method=qlora", "lora_variant=dora"])) == "qdora"
    assert knowledge.kind(compose(["method=lora", "lora_variant=dora"])) == "dora"
    assert "no figure known" in str(knowledge.quality(compose(["method=c3a"])))
    assert rated(GPUS["t4"]) is GPUS["t4"]
    assert rated(CARD).tflops > 0
    for name in ("full", "lora", "qlora", "ia3", "prompt_tuning", "c3a"):
        for parameters in (10**8, 10**10, 7 * 10**10):
            found = dict(knowledge.settings(compose([f"method={name}"]), parameters, 8.0))
            assert found["optimizer=paged_adamw_8bit"].basis == "rule of thumb"
            assert len(found) > 1
