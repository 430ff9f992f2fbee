"""What optimizers keep for each weight, against closed forms."""

import pytest
from helpers.planning import CPU, HIDDEN, INNER, LAYERS, LINEAR, REST, VOCABULARY, predict

from qlora_exp.utils.errors import ConfigError

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


@pytest.mark.parametrize(("bits", "block"), [(8, 256), (4, 128)])
def test_states_of_torchao_are_codes_scales_and_tables(bits: int, block: int):
    words = ["method=full", f"optimizer=adamw_torch_{bits}bit", f"optimizer.optim_args.block_size={block}"]
    kinds = predict(*words, "model.dtype=float32", evaluated=8, device=CPU).phases["evaluation"].kinds
    large = LINEAR + 2 * VOCABULARY * HIDDEN
    tables = 4 * 2**bits * (LAYERS * 7 + 2)
    assert kinds["optimizer"] == 2 * (large * bits // 8 + 4 * large // block + tables + 4 * (2 * LAYERS + 1) * HIDDEN)


def test_muon_keeps_one_state_for_matrices_inside_the_layers():
    kinds = predict("method=full", "optimizer=muon", "model.dtype=float32", evaluated=8).phases["evaluation"].kinds
    assert kinds["optimizer"] == pytest.approx(4 * LINEAR + 8 * REST, abs=8 * (2 * LAYERS + 3))  # and step counters


def test_momentum_of_sgd_is_planned():
    words = ["method=full", "optimizer=sgd", "model.dtype=float32", "optimizer.optim_args.momentum=0.9"]
    assert predict(*words, evaluated=8).phases["evaluation"].kinds["optimizer"] == 4 * (LINEAR + REST)


ROWS = 2 * VOCABULARY + LAYERS * (3 * HIDDEN + 2 * INNER + 8 + 2) + 1


@pytest.mark.parametrize(
    ("optim", "module", "nbytes"),
    [
        ("schedule_free_adamw", "schedulefree", 8 * (LINEAR + REST)),
        ("schedule_free_sgd", "schedulefree", 4 * (LINEAR + REST)),
        # One for each row of a table, an MLP, values and outputs, one for each of four heads, and one for each norm.
        ("adam_mini", "adam_mini", 4 * (LINEAR + REST) + 4 * ROWS),
        ("stable_adamw", "optimi", 8 * (LINEAR + REST)),
        # Each matrix: two states of r rows as long as its longer side, and r vectors as long as its shorter side.
        ("galore_adamw", "galore_torch", 8 * REST + LAYERS * (4 * 12 * 8 * HIDDEN + 3 * (8 * 8 * INNER + 32 * HIDDEN))),
    ],
)
def test_states_of_packaged_optimizers_are_those_of_their_code(optim: str, module: str, nbytes: int):
    pytest.importorskip(module)
    words = ["method=full", f"optimizer={optim}", "model.dtype=float32"]
    words += ["optimizer.optim_args.rank=8"] if optim == "galore_adamw" else []
    kinds = predict(*words, evaluated=8, device=CPU).phases["evaluation"].kinds
    assert kinds["optimizer"] == pytest.approx(nbytes, abs=200)


def test_optimizer_without_its_package_cannot_be_planned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qlora_exp.config.tables.optimizers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="optimizer.optim=stable_adamw needs an extra package"):
        predict("method=full", "optimizer=stable_adamw")


DEEP = ("++model.architecture.num_hidden_layers=8", "model.dtype=float32")


def test_few_frozen_layers_stand_for_all(monkeypatch: pytest.MonkeyPatch):
    words = ["method=freeze", "method.trainable_layers=2", *DEEP]
    few = predict(*words, evaluated=8, device=CPU)
    monkeypatch.setattr("qlora_exp.planning.step._FROZEN", 100)
    whole = predict(*words, evaluated=8, device=CPU)
    assert few.phases == whole.phases
    assert sum(work.flops for work in few.work) == sum(work.flops for work in whole.work)
    assert few.phases["evaluation"].kinds["optimizer"] == pytest.approx(8 * few.trainable, abs=8 * 18)


@pytest.mark.thorough
def test_frozen_layers_take_no_gradients():
    full, freeze = (predict(f"method={name}", *DEEP).phases["steady"].kinds for name in ("full", "freeze"))
    assert freeze["trainable"] + freeze["weights"] == full["trainable"] + full["weights"]  # those of buffers
    assert freeze["optimizer"] < full["optimizer"] / 4
    assert freeze["activations"] < full["activations"]


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_lisa_is_planned_with_the_layers_of_one_draw(count: int):
    words = ["method=lisa", f"method.lisa_activated_layers={count}", *DEEP]
    prediction = predict(*words, evaluated=8)
    layer = 4 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN
    assert prediction.trainable == 2 * VOCABULARY * HIDDEN + HIDDEN + count * layer
    assert prediction.phases["evaluation"].kinds["optimizer"] == pytest.approx(8 * prediction.trainable, abs=8 * 24)
