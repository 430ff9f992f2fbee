import math
from types import SimpleNamespace

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import TuningConfig
from qlora_exp.sweeps import tuning
from qlora_exp.sweeps.rungs import Rung

RATES = {"training.learning_rate": FloatDistribution(1e-5, 1e-2, log=True)}


def config(**training: float) -> Config:
    return Config.model_validate({"training": training})


def test_all_rows_try_the_same_values_after_their_own():
    rows = [tuning.Row(str(own), {"training.learning_rate": own}, None) for own in (1e-4, 2e-3)]
    first, second = (tuning.proposed(row, RATES, TuningConfig()) for row in rows)
    assert first[0]["training.learning_rate"] == 1e-4
    assert second[0]["training.learning_rate"] == 2e-3
    assert first[1:] == second[1:]
    assert tuning.proposed(rows[0], RATES, TuningConfig(seed=1))[1:] != first[1:]
    thirds = {int(8 * math.log10(each["training.learning_rate"] / 1e-5) / 3) for each in first[1:]}
    assert len(thirds) == 8  # spread evenly: one in each eighth of the range


def test_values_out_of_the_range_and_choices_are_proposed_too():
    space = {**RATES, "optimizer.adam_beta2": CategoricalDistribution([0.9, 0.999])}
    found = tuning.proposed(tuning.Row("row", {}, None), space, TuningConfig(n_trials=12))
    assert len(found) == 12
    assert {each["optimizer.adam_beta2"] for each in found} == {0.9, 0.999}


@pytest.mark.parametrize(
    ("metric", "there", "missing"),
    [
        ("after/loss", ["evaluation.generate_rows=0", "unrelated.path=none", "evaluation.before=false"], []),
        ("after/rougeL", ["unrelated.path=none"], ["evaluation.generate_rows=0"]),
        ("after/lm_eval/mmlu/acc", ["evaluation.generate_rows=0"], ["evaluation.lm_eval_tasks=[]"]),
        ("after/unrelated_loss", ["evaluation.lm_eval_tasks=[]"], ["unrelated.path=none"]),
        ("forgetting", ["dataset.evaluate_on=validation"], ["evaluation.before=false", "unrelated.path=none"]),
    ],
)
def test_trials_measure_what_they_are_judged_by_on_validation_rows(metric: str, there: list, missing: list):
    settings = Config.model_validate({"tuning": {"metric": metric, "seed": 7}})
    words = tuning.trial_words(settings, Rung(9, "training.max_steps=5", 1 / 3))
    assert {"dataset.evaluate_on=validation", "seed=7", "training.max_steps=5", *there} <= {*words}
    assert not {*missing} & {*words}


@pytest.mark.parametrize(
    ("distribution", "edges"),
    [
        (FloatDistribution(0.0, 1.0), True),
        (CategoricalDistribution([4, 8, 16, 32]), True),
        (CategoricalDistribution([4, 8]), False),
        (CategoricalDistribution([True, False]), False),
        (CategoricalDistribution(["a", "b", "c"]), False),
    ],
)
def test_best_value_at_the_edge_of_the_range_is_noticed(distribution, edges: bool, tmp_path):
    """The first trial with the smallest value wins, by a metric that is the value itself or its place."""
    order = getattr(distribution, "choices", ())

    def job(values, rung):
        value = values["key"]
        return SimpleNamespace(metric=float(order.index(value)) if order else value, folder=tmp_path)

    stand_in = SimpleNamespace(
        folder=tmp_path, run=lambda jobs: None,
        ended=lambda job: {"outcome": "ok", "seconds": 1.0, "metrics": {"after/loss": job.metric}},
    )  # fmt: skip
    rungs = [Rung(9, "training.max_steps=1", 1.0)]
    (tuned,) = tuning.tune(stand_in, [tuning.Row("row", {}, job)], {"key": distribution}, rungs, TuningConfig())
    assert tuned.at_edge == ["key"] * edges
