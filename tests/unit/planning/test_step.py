"""What optimizers keep for each weight, against closed forms."""

import pytest
from helpers.planning import HIDDEN, INNER, LAYERS, VOCABULARY, predict

pytestmark = pytest.mark.slow


def test_paged_states_are_counted_separately():
    prediction = predict("method=full", "optimizer=paged_adamw_32bit")
    large = [count for count in [HIDDEN * INNER, HIDDEN**2, VOCABULARY * HIDDEN] if count >= 100_000]
    assert prediction.paged == 8 * sum(large) == 0
    big = predict("method=full", "optimizer=paged_adamw_32bit", "++model.architecture.intermediate_size=1024")
    assert big.paged == 8 * LAYERS * 3 * HIDDEN * 1024


def test_lorafa_trains_and_keeps_states_of_b_only():
    both, one = (predict("method=lora", f"optimizer={name}", evaluated=8) for name in ("adamw_torch", "lorafa"))
    assert one.trainable == LAYERS * 16 * (4 * HIDDEN + 2 * INNER + HIDDEN)  # every B
    assert one.phases["evaluation"].kinds["optimizer"] == 2 * 4 * one.trainable
    assert both.trainable == one.trainable + LAYERS * 16 * (6 * HIDDEN + INNER)
    assert one.peak <= both.peak


def test_adafactor_keeps_a_row_and_a_column_per_matrix():
    words = ["method=full", "optimizer.optim=adafactor", "model.dtype=float32"]
    kinds = predict(*words, evaluated=8).phases["evaluation"].kinds
    matrices = LAYERS * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER)) + 2 * (VOCABULARY + HIDDEN)
    assert 4 * matrices <= kinds["optimizer"] < 4.5 * (matrices + (2 * LAYERS + 1) * HIDDEN)
