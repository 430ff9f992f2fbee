import math

import pytest
from helpers.past_runs import ROWS, shifted
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.results import report
from qlora_exp.results.compare import compare
from qlora_exp.results.records import find
from qlora_exp.results.tuned import Tuned, remark

FACTS = {
    "values": {"training.learning_rate": 0.0031234},
    "budget": ["9 x training.max_steps=4", "3 x training.max_steps=12"],
    "metric": "after/loss", "best": 3.3, "first_best": 3.4, "first_median": 3.65, "first_own": math.nan, "failed": 0,
    "minutes": 12.5, "at_edge": [],
}  # fmt: skip
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(best=NUMBERS, median=NUMBERS, own=NUMBERS)
def test_numbers_of_any_kind_survive_the_tag(best: float, median: float, own: float):
    tuned = Tuned.model_validate(FACTS | {"best": best, "first_median": median, "first_own": own})
    read = Tuned.model_validate_json(tuned.model_dump_json())
    assert repr(read) == repr(tuned)


def test_text_says_the_budget_the_sensitivity_and_what_to_doubt():
    facts = {"first_own": 3.5, "failed": 2, "at_edge": ["training.learning_rate"]}
    assert Tuned.model_validate(FACTS | facts).text == (
        "learning_rate=0.00312: after/loss 3.3000 on validation rows; trials: 9 x training.max_steps=4, "
        "3 x training.max_steps=12; the median trial is 0.2500 worse than the best; "
        "the trial with the row's own values is 0.1000 worse; "
        "trials that failed: 2; the best training.learning_rate is the smallest or largest tried: widen the range"
    )
    assert "own values" not in Tuned.model_validate(FACTS).text


@pytest.mark.parametrize(("baseline_is_tuned", "who"), [(False, "this row"), (True, "the baseline")])
def test_verdict_says_that_only_one_of_two_rows_was_tuned(past_runs, baseline_is_tuned: bool, who: str):
    tags = {"tuned": Tuned.model_validate(FACTS).model_dump_json()}
    for seed in (1, 2, 3):
        past_runs(shifted(0.001 * seed), seed=seed, method__r=4, tags=tags if baseline_is_tuned else None)
        past_runs(shifted(-0.5 + 0.001 * seed), seed=seed, method__r=8, tags=None if baseline_is_tuned else tags)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    headings, rows = report.table(found)
    verdict = rows[1][headings.index("loss against the baseline")]
    assert verdict.startswith("better -0.5")
    assert verdict.endswith(f"only {who} was tuned")
    tuned, other = ("r=4", "r=8") if baseline_is_tuned else ("r=8", "r=4")
    assert f"settings: {'tuned' if baseline_is_tuned else 'not tuned'} (r=4)" in "\n".join(found.warnings)
    cells = {row[0]: row[headings.index("tuned")] for row in rows}
    assert cells == {tuned[2:]: "learning_rate=0.00312", other[2:]: "not tuned"}


def test_rows_that_had_other_budgets_are_a_warning(past_runs):
    for r, trials in ((4, 9), (8, 27)):
        facts = FACTS | {"budget": [f"{trials} x training.max_steps=4"]}
        past_runs(ROWS, method__r=r, tags={"tuned": Tuned.model_validate(facts).model_dump_json()})
    warnings = "\n".join(compare(find(past_runs.uri, experiment=past_runs.experiment)).warnings)
    assert "tuning: 9 x training.max_steps=4, 27 x training.max_steps=4" in warnings


@pytest.mark.parametrize("damaged", ["", "{}", "[1]", "nonsense", '{"values": 3}'])
def test_damaged_tag_counts_as_not_tuned_and_is_reported(past_runs, damaged: str, caplog):
    past_runs(ROWS, method__r=4, tags={"tuned": damaged})
    past_runs(ROWS, method__r=8)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert [row.tuned for row in found.rows] == [None, None]
    assert "tuned" not in report.table(found)[0]
    assert "its tag `tuned` cannot be read, so it counts as not tuned" in caplog.text


def test_remark_needs_exactly_one_tuned_row():
    tuned = Tuned.model_validate(FACTS)
    assert remark(tuned, tuned) == remark(None, None) == ""


def test_comparison_says_how_its_rows_were_tuned(past_runs, capsys):
    facts = FACTS | {"at_edge": ["training.learning_rate"]}
    past_runs(ROWS, method__r=4, tags={"tuned": Tuned.model_validate(facts).model_dump_json()})
    past_runs(ROWS, method__r=8)
    report.show(compare(find(past_runs.uri, experiment=past_runs.experiment)))
    shown = capsys.readouterr().out
    assert "method.r=4: learning_rate=0.00312: after/loss 3.3000 on validation rows" in shown
    assert "is the smallest or largest tried: widen the range" in shown
