"""What is advised is the most that is planned to fit, and says why."""

import pytest
from helpers.planning import ONE_LAYER
from hypothesis import assume, given
from hypothesis import strategies as st
from support import exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.planning import advisor
from qlora_exp.planning.advisor import largest
from qlora_exp.planning.gpus import Gpu
from qlora_exp.planning.planner import Prediction
from qlora_exp.planning.replay import Phase
from qlora_exp.utils.errors import UserError

CARD = Gpu("GPU", 24.0)


@given(
    flat=st.floats(0, 50),
    steep=st.floats(0.01, 3),
    steeper=st.floats(-2, 3),
    bend=st.integers(1, 300),
    room=st.floats(0, 600),
    most=st.integers(1, 400),
    known=st.integers(1, 16),
)
def test_largest_count_is_found_where_memory_grows(flat, steep, steeper, bend, room, most, known):
    def need(count: int) -> float:
        assert 1 <= count <= most
        return max(flat, steep * count) + max(steeper, -0.9 * steep) * max(0, count - bend)

    found = largest(need, room, most, known)
    grows = all(need(count) <= need(count + 1) for count in range(1, most))
    assume(grows)
    assert found == max((count for count in range(1, most + 1) if need(count) <= room), default=0)


def test_search_begins_at_a_count_that_fits():
    assert largest(lambda rows: 10 if rows == 1 else 2 * rows, 9, 100, 4) == 4  # a row alone reserves more than four


def test_search_asks_for_few_predictions():
    asked = set()

    def need(count: int) -> float:
        asked.add(count)
        return 100 + 3.5 * count

    assert largest(need, 2000, 1024, 4) == 542
    assert len(asked) <= 5


def test_number_of_gpus_is_the_first_on_which_a_share_fits():
    class Plans:
        positions = 4096

        def __init__(self, gib: float, ranks: int = 1) -> None:
            self.gib, self.ranks = gib, ranks

        def predict(self, rows: int = 1, *_: int, **__: int) -> Prediction:
            size = int((self.gib / self.ranks + 0.1 * rows) * 2**30)
            return Prediction({"steady": Phase({}, size, size)}, [], 1, 2, ranks=self.ranks)

        def over(self, shared: DistributedConfig) -> "Plans":
            if self.gib > 1000:
                raise UserError("cannot be shared out")
            return Plans(self.gib, int(shared.num_processes))

    def gpus(gib: float) -> int:
        plans = Plans(gib)
        return advisor._fits(compose(["method=lora"]), plans.predict(4), plans, [CARD])[CARD].gpus

    assert [gpus(gib) for gib in (20, 36, 72, 144, 320, 2000)] == [1, 2, 4, 8, 0, 0]


@pytest.mark.slow
@pytest.mark.thorough
def test_named_ways_are_compared_and_unplannable_ones_explained():
    words = [*ONE_LAYER, "method=lora", "quantization=none,quanto_int4", "lora_variant=lora"]
    cards = [Gpu("GPU", size) for size in (0.68, 0.72)]
    found, why = advisor.options(words, cards[0], cards, lambda _: None)
    assert [one.name for one in found] == ["method=lora quantization=none"]
    assert "cannot be planned" in why["method=lora quantization=quanto_int4"]
    smaller, larger = (found[0].fits[card] for card in cards)
    assert larger.length == 256  # all that the model takes
    assert smaller.rows < larger.rows
    assert 1 < larger.rows < advisor.MOST_ROWS
    with pytest.raises(UserError, match="cannot be planned"):
        advisor.options([*ONE_LAYER, "method=lora", "quantization=quanto_int4"], cards[0], cards, lambda _: None)


@pytest.mark.slow
@pytest.mark.thorough
def test_shipped_models_are_planned_smallest_first(monkeypatch):
    monkeypatch.setattr(advisor, "METHODS", {"LoRA": ["method=lora"]})
    names = ["opt_125m", "llama2_7b", "smollm2_135m", "hub", "tiny_llama"]
    monkeypatch.setattr(advisor.configs, "options", lambda group: names)
    found, why = advisor.models(["training.max_length=2112"], CARD, lambda _: None)
    assert "2048 positions" in why["opt_125m, LoRA"]
    assert [one.name for one in found] == ["smollm2_135m", "llama2_7b"]
    assert found[0].parameters == 134_515_008


def advise(*arguments: str) -> int:
    return exit_code("advise", *ONE_LAYER, *arguments)


@pytest.mark.slow
def test_advise_command_says_what_to_choose(capsys, monkeypatch):
    monkeypatch.setattr(advisor, "MOST_ROWS", 8)
    monkeypatch.setattr(advisor, "METHODS", {name: advisor.METHODS[name] for name in ("LoRA", "QLoRA")})
    assert advise("--vram", "8") == 0
    shown = capsys.readouterr().out
    assert "choose   LoRA for quality: it fits" in shown
    assert "settings method.r: 16" in shown
    assert "7.0%" in shown
    monkeypatch.setattr(advisor, "CARDS", (4, 24))
    assert advise("method=lora") == 0  # for cards of every size
    shown = capsys.readouterr().out
    assert all(f"│ {size} " in shown for size in advisor.CARDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--models", "--vram", "8"], "leave out model= and method="),
        (["device=cpu"], "advise is about GPUs"),
        (["--gpu", "rtx4091"], "did you mean"),
        (["method=lora,qlorra"], "did you mean"),
        (["method.r=4,8"], "only if the methods are named"),
        (["model.dtype=float16"], "name the methods too"),
        (["quantization=nf4"], "name the methods too"),
        (["--gpu", "a10,l4"], "advise is about one GPU"),
        (["--vram", "8", "--goal", "cost"], "--goal cost needs the price"),
        (["--vram", "8", "--price", "1"], "--price needs the GPU's name"),
    ],
)
def test_contradictory_advise_arguments_are_rejected(arguments, says, capsys):
    assert advise(*arguments) == 1
    assert says in capsys.readouterr().err


def test_batch_longer_than_the_model_is_rejected():
    with pytest.raises(UserError, match="positions"):
        advisor.options([*ONE_LAYER, "method=lora", "training.max_length=512"], CARD, [CARD], lambda _: None)
