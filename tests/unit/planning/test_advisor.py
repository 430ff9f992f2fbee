"""What is advised is the most that is planned to fit, and says why."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning import advisor
from qlora_exp.planning.advisor import Fit, Option, Sized, choose, largest
from qlora_exp.planning.gpus import GPUS, Gpu
from qlora_exp.planning.planner import Prediction
from qlora_exp.planning.replay import Phase
from qlora_exp.planning.tables import show_models
from qlora_exp.utils.errors import UserError

CARD = Gpu("GPU", 24.0)
TINY = [
    "model=tiny_llama",
    "+model.architecture={_name_or_path: random:llama, model_type: llama, vocab_size: 512, hidden_size: 128,"
    " intermediate_size: 256, num_hidden_layers: 6, num_attention_heads: 4, num_key_value_heads: 4,"
    " max_position_embeddings: 256}",
    "training.max_length=64",
]


@given(
    flat=st.floats(0, 50),
    steep=st.floats(0.01, 3),
    steeper=st.floats(-2, 3),
    bend=st.integers(1, 300),
    room=st.floats(0, 600),
    most=st.integers(1, 400),
    known=st.integers(1, 16),
)
def test_the_largest_is_found_where_needs_grow(flat, steep, steeper, bend, room, most, known):
    def need(count: int) -> float:
        assert 1 <= count <= most
        return max(flat, steep * count) + max(steeper, -0.9 * steep) * max(0, count - bend)

    found = largest(need, room, most, known)
    grows = all(need(count) <= need(count + 1) for count in range(1, most))
    assume(grows)
    assert found == max((count for count in range(1, most + 1) if need(count) <= room), default=0)


def test_what_is_known_to_fit_is_where_the_search_begins():
    assert largest(lambda rows: 10 if rows == 1 else 2 * rows, 9, 100, 4) == 4  # a row alone reserves more than four


def test_few_needs_are_asked_for():
    asked = set()

    def need(count: int) -> float:
        asked.add(count)
        return 100 + 3.5 * count

    assert largest(need, 2000, 1024, 4) == 542
    assert len(asked) <= 5


def option(name: str, gib: float, rows: int, length: int, flops: float = 1.0) -> Option:
    size = int(gib * 2**30)
    from qlora_exp.planning.fake_tensors import Work

    planned = Prediction({"steady": Phase({"weights": size}, size, size)}, [Work(flops, 0)], 1, 2)
    return Option(name, compose(["method=lora"]), planned, {CARD: Fit(rows, length)})


@pytest.mark.parametrize(
    ("lora", "qlora", "says"),
    [
        ((14, 6848), (39, 8192), "LoRA: it fits, so nothing is lost to 4 bits; QLoRA would take 7.0 GiB, not 18.0"),
        ((2, 1024), (39, 8192), "with 2 rows at once, not 4: training.gradient_accumulation_steps"),
        ((0, 0), (39, 8192), "QLoRA: LoRA does not fit with one row of 512 tokens (it takes 18.0 GiB with 4)"),
        ((0, 0), (1, 512), "with 1 row at once"),
        ((0, 0), (0, 256), "training.max_length=256"),
        ((0, 0), (0, 0), "neither"),
    ],
)
def test_lora_is_chosen_while_it_fits(lora, qlora, says):
    assert says in ": ".join(choose([option("LoRA", 18, *lora), option("QLoRA", 7, *qlora)], CARD))


def test_what_4_bits_cost_in_time_is_said_where_rates_are_known():
    card = replace(GPUS["rtx4090"], memory_gib=24.0)
    options = [option("LoRA", 18, 4, 512, 1e12), option("QLoRA", 7, 4, 512, 1.2e12)]
    for one in options:
        one.fits[card] = Fit(4, 512)
    assert "+20% time" in choose(options, card)[1]


def test_nothing_is_chosen_where_one_of_the_two_was_not_planned():
    assert choose([option("LoRA", 18, 1, 64)], CARD) == ("", "")


def test_methods_that_are_named_are_compared_and_those_that_cannot_be_say_why():
    words = [*TINY, "method=lora,boft", "lora_variant=lora"]
    card = Gpu("GPU", 0.72)
    found, why = advisor.options(words, card, [card], lambda _: None)
    assert [one.name for one in found] == ["method=lora"]
    assert "cannot be planned" in why["method=boft"]
    fit = found[0].fits[card]
    assert fit.length == 256  # all that the model takes
    assert 1 < fit.rows < advisor.MOST_ROWS
    with pytest.raises(UserError, match="cannot be planned"):
        advisor.options([*TINY, "method=boft"], card, [card], lambda _: None)


def test_what_fits_a_larger_card_is_no_less():
    cards = [Gpu("GPU", size) for size in (0.68, 0.72)]
    found, _ = advisor.options([*TINY, "method=qlora"], cards[0], cards, lambda _: None)
    rows = [found[0].fits[card].rows for card in cards]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


def test_the_largest_model_of_each_card_is_shown(capsys):
    gib = 2**30
    models = [Sized("small", 10**9, {"LoRA": 2 * gib, "QLoRA": gib}), Sized("big", 10**10, {"QLoRA": 6 * gib})]
    show_models(models, {"third, LoRA": "no"}, advisor.cards(Gpu("GPU", 0.0)))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line] == [
        ["4", "1.0 B", "1.0 B"], ["6", "1.0 B", "1.0 B"],
        *([str(size), "1.0 B", "10.0 B"] for size in advisor.CARDS[2:]),
    ]  # fmt: skip


def test_shipped_models_are_looked_at_smallest_first(monkeypatch):
    monkeypatch.setattr(advisor, "METHODS", {"LoRA": ["method=lora"]})
    monkeypatch.setattr(advisor.configs, "options", lambda group: ["opt_125m", "smollm2_135m", "hub", "tiny_llama"])
    found, why = advisor.models(["training.max_length=4096"], CARD, lambda _: None)
    assert "2048 positions" in why["opt_125m, LoRA"]
    assert [one.name for one in found] == ["smollm2_135m"]
    found, _ = advisor.models(["training.max_length=64"], CARD, lambda _: None)
    assert [one.name for one in found] == ["opt_125m", "smollm2_135m"]
    assert found[0].parameters == 125_239_296


def run(*arguments: str) -> int:
    return exit_code("advise", *TINY, *arguments)


def test_the_command_says_what_to_choose(capsys, monkeypatch):
    monkeypatch.setattr(advisor, "MOST_ROWS", 8)
    monkeypatch.setattr(advisor, "METHODS", {name: advisor.METHODS[name] for name in ("LoRA", "QLoRA")})
    assert run("--vram", "8") == 0
    shown = capsys.readouterr().out
    assert "choose   LoRA" in shown
    assert "7.0%" in shown
    monkeypatch.setattr(advisor, "CARDS", (4, 24))
    assert run("method=lora") == 0  # for cards of every size
    shown = capsys.readouterr().out
    assert all(f"│ {size} " in shown for size in advisor.CARDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--models", "--vram", "8"], "leave out model= and method="),
        (["device=cpu"], "advise is about GPUs"),
        (["--gpu", "rtx4091"], "did you mean"),
        (["method=lora,qlorra"], "did you mean"),
        (["method.r=4,8"], "lists with the methods named"),
        (["model.dtype=float16"], "name the methods too"),
        (["quantization=nf4"], "name the methods too"),
    ],
)
def test_what_cannot_be_advised_is_refused_at_once(arguments, says, capsys):
    assert run(*arguments) == 1
    assert says in capsys.readouterr().err


def test_a_batch_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="positions"):
        advisor.options([*TINY, "method=lora", "training.max_length=512"], CARD, [CARD], lambda _: None)
