"""The way to compute a step is chosen by what fits and what is fast, and never changes what a step learns from."""

import random
import re
from dataclasses import replace

import pytest
from helpers.planning import ARCHITECTURE
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning import gpus, tuning
from qlora_exp.planning.fit import room, step_seconds
from qlora_exp.planning.gpus import GPUS
from qlora_exp.planning.planner import Planner, resolved_on
from qlora_exp.utils.errors import ConfigError

CARD = GPUS["rtx4090"]
WORDS = ["model=tiny_llama", ARCHITECTURE, "training.tune=auto", "training.max_length=64", "method=lora"]


def candidates(*words: str, gib: float = 24.0, lengths=(10, 20, 64)):
    config = compose([*WORDS, *words])
    resolved = resolved_on(config, CARD.device)
    card = replace(CARD, memory_gib=gib)
    return [*tuning._candidates(config, resolved, lengths, None, card, tuning.published(card, resolved))]


def gib_for(peak: int) -> float:
    """Return the memory of a card on which a plan of so many bytes just fits."""
    return CARD.memory_gib + (peak - room(CARD)) * 1.07 / 2**30 + 1e-6


def test_every_candidate_has_the_rows_of_the_configured_step():
    found = candidates("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2")
    padded = [choice for choice in found if choice.padding != "free"]
    assert [choice.rows for choice in padded] == [1, 2, 4]
    assert [choice.padding for choice in padded] == ["batch", "by_length", "batch"]
    assert [choice.rows for choice in found if choice.padding == "free"] == [2, 4]
    assert {choice.rows * choice.batches for choice in found} == {4}
    assert not any(choice.gradient_checkpointing for choice in found)  # all fit without
    assert [choice.peak for choice in padded] == sorted(choice.peak for choice in padded)


def test_less_memory_means_smaller_batches_and_then_recomputation():
    words = ["training.per_device_train_batch_size=8"]
    words.append("training.sft_config={pad_to_multiple_of: 1}")  # so that padding cannot be left out
    chosen = candidates(*words, gib=gib_for(candidates(*words, lengths=[64])[2].peak), lengths=[64])
    assert [choice.fits for choice in chosen if not choice.gradient_checkpointing] == [True, True, True, False]
    assert any(choice.gradient_checkpointing for choice in chosen)
    assert not any(choice.fits for choice in candidates(gib=0.7))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["training.neftune_noise_alpha=5"], "NEFTune"),
        (["lora_variant=velora"], "depends on the rows of a batch"),
        (["method=lily"], "depends on the rows of a batch"),
    ],
)
def test_batches_stay_where_they_are_part_of_what_is_learned(words, why):
    words = [*words, "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    assert why in tuning.fixed_rows(compose([*WORDS, *words]), has_router=False)
    found = candidates(*words)
    assert {choice.rows for choice in found} == {4}
    assert all(
        f"batches are not changed, because {choice.kept}" in str(choice) and why in str(choice) for choice in found
    )


def test_batches_stay_with_llm_int8():
    assert "LLM.int8" in tuning.fixed_rows(compose([*WORDS, "quantization=int8"]), has_router=False)


def test_batches_stay_in_a_mixture_of_experts():
    assert "router" in tuning.fixed_rows(compose(WORDS), has_router=True)
    assert tuning.fixed_rows(compose(WORDS), has_router=False) is None


@pytest.mark.parametrize("asked", [True, False])
def test_what_the_user_sets_stays(asked: bool):
    found = candidates(f"training.gradient_checkpointing={asked}", gib=0.7)
    assert {choice.gradient_checkpointing for choice in found} == {asked}


@pytest.mark.slow
def test_some_layers_recompute_where_not_all_need_to():
    words = ["model.architecture.num_hidden_layers=20", "training.per_device_train_batch_size=4"]
    words += ["training.padding=batch", "training.neftune_noise_alpha=5"]  # with these rows only
    whole, none = (
        candidates(*words, f"training.gradient_checkpointing={on}", lengths=[64])[-1] for on in (True, False)
    )
    chosen = candidates(*words, gib=gib_for((whole.peak + none.peak) // 2), lengths=[64])
    some = [choice for choice in chosen if choice.recomputed_layers]
    assert [choice.rows for choice in some] == [4]
    assert some[0].recomputed_layers in (10, 15)
    assert whole.peak < some[0].peak < none.peak
    assert none.seconds < some[0].seconds < whole.seconds
    assert some[0].fits
    assert f"gradient_checkpointing=true recomputed_layers={some[0].recomputed_layers} padding=batch" in str(some[0])


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.integers(1, 4), st.integers(1, 4))
def test_sorted_rows_have_less_padding_than_rows_as_they_come(lengths, rows, batches):
    found = tuning._mean_of_sorted(lengths, rows, batches)
    assert min(lengths) <= found <= max(lengths)
    if len({*lengths}) > 1:
        spread = max(lengths) - min(lengths)
        assert found <= tuning._mean_of_longest(lengths, rows) + 0.25 * spread  # 200 steps are drawn
    alone = tuning._mean_of_sorted(lengths, 1, rows * batches)
    assert alone <= found + 1e-9


@pytest.mark.parametrize(("family", "apart"), [("llama", True), ("opt", False), ("mamba", False), ("unknown", False)])
def test_families_that_do_not_keep_rows_apart_are_padded(family: str, apart: bool):
    assert tuning.keeps_rows_apart(family) is apart


def test_padding_stays_as_the_user_sets_it_and_on_a_cpu():
    words = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    assert {choice.padding for choice in candidates(*words, "training.padding=by_length")} == {"by_length"}
    config = compose([*WORDS, *words, "device=cpu"])
    resolved = resolved_on(config, CARD.device)
    rates = tuning.published(CARD, resolved)
    found = tuning._candidates(config, resolved, [10, 20], None, gpus.this_cpu(), rates)
    assert {choice.padding for choice in found} == {"batch", "by_length"}


def choice(rows: int, seconds: float, peak: int, fits: bool = True, padding: str = "batch") -> tuning.Choice:
    return tuning.Choice(rows, 8 // rows, False, False, seconds, peak, fits, padding=padding)


@pytest.mark.parametrize(
    ("found", "rows"),
    [
        ([choice(1, 1.0, 1), choice(8, 1.1, 8)], 8),  # as configured, since it is as fast
        ([choice(1, 1.0, 1), choice(8, 1.2, 8)], 1),
        ([choice(1, 1.02, 1), choice(2, 1.0, 2), choice(8, 1.3, 8)], 2),
        ([choice(1, 1.0, 1), choice(8, 0.5, 8, fits=False)], 1),
        ([choice(1, 1.0, 1), choice(8, 0.9, 8, padding="free")], 1),  # not so much faster
        ([choice(1, 1.0, 1), choice(4, 0.8, 8, padding="free")], 4),
        ([choice(1, 2.0, 1, fits=False), choice(8, 1.0, 8, fits=False)], 1),
    ],
)
def test_fastest_that_fits_is_chosen(found, rows, monkeypatch):
    monkeypatch.setattr(tuning, "_candidates", lambda *_: found)
    config = compose([*WORDS, "training.per_device_train_batch_size=8"])
    resolved = resolved_on(config, CARD.device)
    chosen = tuning.choose(config, resolved, [1], None, CARD, tuning.published(CARD, resolved))
    assert chosen.rows == rows
    applied = chosen.applied(resolved)
    assert (applied.per_device_train_batch_size, applied.gradient_accumulation_steps) == (rows, 8 // rows)
    assert f"per_device_train_batch_size={rows} " in applied.tuned
    assert f"of {len(found)} ways that were planned" in applied.tuned
    assert ("may not fit" in applied.tuned) != chosen.fits


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.integers(1, 8))
def test_mean_of_the_longest_lies_between_mean_and_maximum(lengths, rows):
    cut = [min(length, 400) for length in lengths]
    mean = tuning._mean_of_longest(cut, rows)
    assert sum(cut) / len(cut) - 1e-9 <= mean <= max(cut) + 1e-9
    assert mean <= tuning._mean_of_longest(cut, rows + 1) + 1e-9
    assert tuning._mean_of_longest(cut, 1) == pytest.approx(sum(cut) / len(cut))


def test_mean_of_the_longest_is_that_of_random_batches():
    draw = random.Random(0)
    lengths = [draw.randint(10, 300) for _ in range(200)]
    drawn = [max(draw.choices(lengths, k=4)) for _ in range(20_000)]
    found = tuning._mean_of_longest(lengths, 4)
    assert found == pytest.approx(sum(drawn) / len(drawn), rel=0.01)


def test_plan_needs_the_memory_of_the_gpu():
    config = compose(WORDS)
    with pytest.raises(ConfigError, match="add --gpu NAME or --vram GIB"):
        tuning.planned(config, resolved_on(config, CARD.device), replace(CARD, memory_gib=0.0))
    without = compose([word for word in WORDS if "tune" not in word])
    resolved = resolved_on(without, CARD.device)
    assert tuning.planned(without, resolved, CARD) is resolved


def test_cpu_computes_in_bfloat16_only_where_that_is_measured_to_be_faster(monkeypatch):
    config = compose([*WORDS, "device=cpu"])
    resolved = resolved_on(config, CARD.device)
    for faster, expected in ((1.1, False), (1.5, True)):
        monkeypatch.setattr(tuning, "product_flops", lambda *args, by=faster: 1e9 * (by if args[3] else 1))
        assert tuning.measured(config, resolved, [64]).bf16 is expected
    for words in (["training.bf16=false"], ["model.dtype=bfloat16"]):
        fixed = compose([*WORDS, "device=cpu", *words])
        assert not tuning.measured(fixed, resolved_on(fixed, CARD.device), [64]).bf16


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        ([], [(True, False), (False, True), (True, True)]),
        (["method=lily"], [(True, False)]),  # its rules look at all tokens
        (["training.tiled_mlp=true"], [(False, True), (False, True), (True, True)]),  # as configured, and more
        (["training.gradient_checkpointing=false"], []),
    ],
)
def test_memory_of_long_rows_is_saved_where_nothing_else_fits(words, ways):
    words = ["training.max_length=2048", "training.per_device_train_batch_size=1", *words]
    found = candidates(*words, gib=0.601, lengths=[2048])
    long = [choice for choice in found if choice.activation_offloading or choice.tiled_mlp]
    assert [(choice.activation_offloading, choice.tiled_mlp) for choice in long] == ways
    assert {choice.rows for choice in long} <= {1}
    if long:
        assert long[-1].gradient_checkpointing
        resolved = long[-1].applied(resolved_on(compose([*WORDS, *words]), CARD.device))
        assert (resolved.activation_offloading, resolved.tiled_mlp) == ways[-1]


@pytest.mark.thorough
def test_longest_row_of_an_8b_is_planned_with_tiles_where_it_does_not_fit_otherwise():
    words = ["model=llama31_8b", "method=qlora", "training.per_device_train_batch_size=1", "training.tune=auto"]
    words += ["training.max_length=40000", "training.per_device_eval_batch_size=1"]
    config = compose([*words, "model.architecture.max_position_embeddings=65536"])
    resolved = resolved_on(config, CARD.device)
    choice = tuning.choose(config, resolved, [40000], 40000, CARD, tuning.published(CARD, resolved))
    assert (choice.fits, choice.tiled_mlp, choice.gradient_checkpointing) == (True, True, True)


def test_time_of_a_choice_is_that_of_its_plan():
    config = compose([*WORDS, "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"])
    tuned = tuning.planned(config, resolved_on(config, CARD.device), CARD)
    seconds = step_seconds(Planner(config, tuned).predict(), CARD)
    assert seconds is not None
    (stated,) = re.findall(r"about (\S+) s a step", str(tuned.tuned))
    assert float(stated) == pytest.approx(seconds, rel=0.1)  # it is printed with two digits
