from dataclasses import replace

import pytest
from helpers.past_runs import ROWS, answer, recorded

from qlora_exp.config.plugins import Facts
from qlora_exp.results import report
from qlora_exp.results.compare import compare
from qlora_exp.results.metric_direction import facts_of, lower_is_better
from qlora_exp.results.page.looks import metric_label
from qlora_exp.utils.errors import ConfigError


def tag(higher: bool | None, version: str = "0.1", unit: str = "") -> str:
    facts = Facts(package="words", version=version, source="ab12", higher_is_better=higher, unit=unit)
    return facts.model_dump_json(exclude_defaults=True)


def runs(higher: bool | None, *, tags=None, scores: bool = True):
    """Two rows of three seeds; the second has scores that are nearly 2 higher on each answer."""
    for rate, more in (("1", 0.0), ("2", 2.0)):
        for seed in (1, 2, 3):
            values = [n + more * (1 - 0.01 * seed) + 0.01 * seed * (-1) ** n for n in range(8)]
            answers = [
                answer(str(n), "", **{"metric/length": value} if scores else {}) for n, value in enumerate(values)
            ]
            own = tags or {"metric.length": tag(higher, unit="words")}
            measured = {"after/metric/length": sum(values) / 8}
            yield recorded(ROWS, seed=seed, answers=answers, tags=own, metrics=measured, training__learning_rate=rate)


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(("higher", "verdict"), [(True, "better +1.96"), (False, "worse +1.96")])
def test_verdicts_on_metrics_of_packages_have_the_recorded_direction(higher: bool, verdict: str, scores: bool):
    found = compare([*runs(higher, scores=scores)], "metric/length")
    (judged,) = found.verdicts.values()
    assert judged.text.startswith(verdict)
    assert judged.difference.items == (8 if scores else 0)  # a metric of all answers together is compared by seeds
    assert (found.lower_is_better, found.unit) == (not higher, "words")
    assert metric_label(found) == f"length, words ({'higher' if higher else 'lower'} is better)"
    for preset in ("all", "shortest"):
        headings, rows = report.table(found, preset)
        assert rows[1][headings.index("metric/length")].startswith("5.4")
    assert [*found.ties.values()] == (["b", "a"] if higher else ["a", "b"])


def test_metric_that_says_no_direction_is_not_compared():
    for damaged in (tag(None), "{", '{"package": 3}', "[1]"):
        with pytest.raises(ConfigError, match="metric/length: these runs do not say whether higher values are better"):
            compare([*runs(True, tags={"metric.length": damaged})], "metric/length")
    mixed = [*runs(True)][:3] + [*runs(False)][3:]
    with pytest.raises(ConfigError, match="do not agree whether higher"):
        compare(mixed, "metric/length")
    with pytest.raises(ConfigError, match="available: loss, metric/length"):
        compare([*runs(True)], "metric/lenght")


def test_row_whose_metric_failed_says_why():
    *others, last = runs(True)
    tags = last.tags | {"metric_failed.after.length": "ConnectionError: away"}
    failed = replace(last, tags=tags, metrics={"after/loss": 3.0})
    headings, rows = report.table(compare([*others, failed], "metric/length"))
    assert rows[1][headings.index("metric/length against the baseline")] == (
        "not measured in 1 of 3 runs; ConnectionError: away"
    )


def test_other_versions_and_other_sources_of_a_metric_are_a_warning():
    old, new = [*runs(True)][:3], [*runs(True, tags={"metric.length": tag(True, "0.2"), "loss.focal": tag(None)})][3:]
    found = compare([*old, *new], "loss")
    assert "metric length: words 0.1 (ab12), words 0.2 (ab12)" in found.warnings
    assert not any("focal" in line for line in found.warnings)
    assert {*facts_of(new)} == {"metric.length", "loss.focal"}


def test_losses_seconds_and_bytes_are_better_when_lower():
    assert lower_is_better("after/loss")
    assert not lower_is_better("after/rougeL")
