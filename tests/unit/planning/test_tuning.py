"""The way to compute a step is chosen by what fits and what is fast, and never changes what a step learns from."""

import random
from dataclasses import replace

import pytest
from helpers.planning import ARCHITECTURE
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.training import TrainingConfig
from qlora_exp.planning import tuning
from qlora_exp.planning.fit import room
from qlora_exp.planning.gpus import GPUS
from qlora_exp.planning.planner import resolved_on
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
    found = candidates("training.per_device_train_batch_size=6", "training.gradient_accumulation_steps=2")
    assert [choice.rows for choice in found] == [1, 2, 3, 4, 6, 12]
    assert {choice.rows * choice.batches for choice in found} == {12}
    assert not any(choice.gradient_checkpointing for choice in found)  # all fit without
    assert [choice.peak for choice in found] == sorted(choice.peak for choice in found)


def test_less_memory_means_smaller_batches_and_then_recomputation():
    words = ["training.per_device_train_batch_size=8"]
    chosen = candidates(*words, gib=gib_for(candidates(*words)[2].peak))
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


def test_batches_stay_in_a_mixture_of_experts():
    assert "router" in tuning.fixed_rows(compose(WORDS), has_router=True)
    assert tuning.fixed_rows(compose(WORDS), has_router=False) is None


@pytest.mark.parametrize("asked", [True, False])
def test_what_the_user_sets_stays(asked: bool):
    found = candidates(f"training.gradient_checkpointing={asked}", gib=0.7)
    assert {choice.gradient_checkpointing for choice in found} == {asked}


def choice(rows: int, seconds: float, peak: int, fits: bool = True) -> tuning.Choice:
    return tuning.Choice(rows, 8 // rows, False, False, seconds, peak, fits)


@pytest.mark.parametrize(
    ("found", "rows"),
    [
        ([choice(1, 1.0, 1), choice(8, 1.1, 8)], 8),  # as configured, since it is as fast
        ([choice(1, 1.0, 1), choice(8, 1.2, 8)], 1),
        ([choice(1, 1.02, 1), choice(2, 1.0, 2), choice(8, 1.3, 8)], 2),
        ([choice(1, 1.0, 1), choice(8, 0.5, 8, fits=False)], 1),
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
    assert ("may not fit" in applied.tuned) != chosen.fits


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.integers(1, 8))
def test_mean_of_the_longest_lies_between_mean_and_maximum(lengths, rows):
    training = TrainingConfig(max_length=400)
    cut = [min(length, 400) for length in lengths]
    mean = tuning._mean_of_longest(lengths, rows, training)
    assert sum(cut) / len(cut) - 1e-9 <= mean <= max(cut) + 1e-9
    assert mean <= tuning._mean_of_longest(lengths, rows + 1, training) + 1e-9
    assert tuning._mean_of_longest(lengths, 1, training) == pytest.approx(sum(cut) / len(cut))


def test_mean_of_the_longest_is_that_of_random_batches():
    draw = random.Random(0)
    lengths = [draw.randint(10, 300) for _ in range(200)]
    drawn = [max(draw.choices(lengths, k=4)) for _ in range(20_000)]
    found = tuning._mean_of_longest(lengths, 4, TrainingConfig(max_length=1024))
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
