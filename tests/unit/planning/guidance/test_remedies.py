"""What is named where a run does not fit does fit."""

from dataclasses import replace

import pytest
from helpers.planning import ONE_LAYER

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning.fit import needed_for, outside, verdict
from qlora_exp.planning.gpus import Gpu
from qlora_exp.planning.guidance.remedies import advice, remedies
from qlora_exp.planning.planner import planner
from qlora_exp.utils.units import GIB

CARD = Gpu("a card", 24.0)


@pytest.mark.slow
def test_run_that_does_not_fit_would_fit_with_what_is_named_instead():
    words = [*ONE_LAYER, "++model.architecture.hidden_size=256", "++model.architecture.vocab_size=2048", "method=lora"]
    words += ["training.max_length=256", "training.per_device_train_batch_size=8", "training.max_steps=1"]
    words += ["training.gradient_checkpointing=false"]
    config = compose(words)
    needed = planner(config, CARD.device).predict().peak
    card = replace(CARD, memory_gib=outside(1) + 0.6 * needed / GIB)
    found = remedies(config, card)
    assert len(found) == 2
    assert all("per_device_eval_batch_size" in change for change in found)  # evaluation's batch is too large, too
    for change in found:
        changed = compose([*words, *change.split()])
        assert verdict(planner(changed, card.device).predict(), card) == "fits", change
        training = changed.training
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8


def test_run_that_nothing_makes_fit_is_said_to():
    config = compose([*ONE_LAYER, "method=full"])
    assert remedies(config, replace(CARD, memory_gib=outside(1) + 1e-6)) == []
    assert "`qlora-exp advise` compares models" in advice([], CARD)


@pytest.mark.parametrize(
    ("device", "found", "says"),
    [
        (CARD, ["a=1", "b=2"], "it would fit with a=1, or with b=2"),
        (Gpu("CPU", 1, type="cpu"), ["a=1"], "it should fit with a=1"),  # plans for CPUs count tensors only
        (Gpu("CPU", 1, type="cpu", limited_by="ulimit -v"), [], "allows: raise that limit, or take a smaller model"),
    ],
)  # fmt: skip
def test_advice_is_as_sure_as_the_plan(device, found, says):
    assert advice(found, device).endswith(says)


def test_attention_that_keeps_no_matrix_is_named_first():
    words = ["model=tiny_llama", "method=lora", "model.attn_implementation=eager", "training.max_length=2048"]
    words += ["training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=1"]
    attentions = [], ["model.attn_implementation=sdpa"]
    peaks = [planner(compose([*words, *more]), Gpu("", 0.0).device).predict().peak for more in attentions]
    assert peaks[1] < 0.9 * peaks[0]
    gpu = Gpu("", needed_for(0.95 * peaks[0], Gpu("", 0.0)))
    assert remedies(compose(words), gpu)[0] == "model.attn_implementation=sdpa"


@pytest.mark.slow
def test_longest_row_that_is_named_fits_with_the_batches_that_are_named():
    words = [*ONE_LAYER, "++model.architecture.hidden_size=256", "++model.architecture.vocab_size=2048", "method=lora"]
    words.append("++model.architecture.max_position_embeddings=4096")
    words += [
        "training.max_length=4096",
        "training.per_device_train_batch_size=4",
        "training.gradient_checkpointing=true",
    ]
    least = [*words, "training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=1"]
    least.append("quantization=nf4_double")
    whole, half = (planner(compose([*least, f"training.max_length={length}"]), CARD.device).predict().peak
                   for length in (4096, 2048))  # fmt: skip
    card = replace(CARD, memory_gib=needed_for((half + whole) / 2, CARD))
    (found,) = remedies(compose(words), card)
    assert "which cuts longer rows" in advice([found], CARD)
    changed = compose([*words, *found.split()])
    assert 2048 <= changed.training.max_length < 4096
    assert verdict(planner(changed, card.device).predict(), card) == "fits"
