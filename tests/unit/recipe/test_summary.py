import pytest

from qlora_exp.recipe import summary

COST = {
    "trainable_parameters": 10, "total_parameters": 100, "trainable_share": 0.1, "model_bytes": 1e6, "steps": 40,
    "step_seconds_mean": 3.0, "tokens_per_second": 50, "step_seconds_p50": 3.0, "train_loss": 2.5,
    "final_train_loss": 1.25, "run_seconds": 7260.0,
}  # fmt: skip


def test_cost_has_final_training_loss_and_times():
    rows = dict(summary.cost(COST))
    assert rows["training loss"] == "1.2500 at the end, 2.5000 on average"
    assert (rows["training time"], rows["total time"]) == ("2.0 min, 40 steps", "121.0 min")


@pytest.mark.parametrize("missing", ["final_train_loss", "step_seconds_mean", "run_seconds"])
def test_what_was_not_measured_has_no_row(missing: str):
    metrics = {key: value for key, value in COST.items() if key != missing}
    if missing == "step_seconds_mean":  # a run of one step has no rates
        del metrics["tokens_per_second"]
    assert len(summary.cost(metrics)) == len(summary.cost(COST)) - len(COST) + len(metrics)
