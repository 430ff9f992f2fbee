import math
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import plugins as packages
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.plugins import Facts, Plugin
from qlora_exp.training.plugins import user_losses, user_metrics
from qlora_exp.training.plugins.user_metrics import Metric
from qlora_exp.utils.errors import ConfigError

SAMPLES = [{"prompt": "p", "reference": "a b", "answer": text} for text in ("a b", "a", "")]
ROWS = [{"prompt": "p", "completion": "a b"}] * 3


def metric(function, **settings) -> Metric:
    facts = Facts(package="p", version="1", source="")
    return Metric(Plugin("metric", "m", "p", "1", "p:m"), function, facts, **settings)


def scored(result, **settings):
    return metric(lambda answers, references: result, **settings)(["a", "b"], ["a", "b"], ["", ""], [])


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6) | st.booleans(),
                min_size=2, max_size=2))  # fmt: skip
def test_numbers_of_any_kind_are_scores(values: list):
    wanted = [float(value) for value in values]
    kinds = [tuple, iter, np.array, lambda given: torch.tensor(given, dtype=torch.float64)]
    assert all(scored(kind(values)) == wanted for kind in kinds)
    assert scored(values[0]) == scored(np.array(values[0])) == scored(np.float64(values[0])) == wanted[0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "it returned NoneType, not a number or a list"),
        ("12", "it returned a str"),
        ({"a": 1, "b": 2}, "it returned a dict"),
        ({0.1, 0.2}, "it returned a set"),
        ([0.5], "it returned 1 scores for 2 answers"),
        ([0.5, 0.5, 0.5], "3 scores for 2 answers"),
        ([[0.5], [0.5]], r"score 1 is \[0.5\], which is not a number"),
        (np.ones((2, 1)), "score 1 is array"),
        ([0.5, "0.5"], "score 2 is '0.5', which is not a number"),
        ([0.5, None], "score 2 is None"),
        ([0.5, math.nan], "score 2 is nan, not a finite number"),
        (math.inf, "the score is inf, not a finite number"),
        (1j, "not a number"),
        (torch.tensor([0.5, math.nan]), "score 2 is nan"),
    ],
)
def test_what_is_no_score_is_refused(result, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        scored(result)


def test_scores_out_of_the_declared_range_are_refused():
    with pytest.raises(ValueError, match="score 1 is 40, not a finite number from 0 to 1"):
        scored([40, 0.5], range=(0.0, 1.0))
    assert scored([1 + 1e-12, 0], range=(0.0, 1.0)) == pytest.approx([1, 0])


def test_metric_cannot_change_the_texts_that_others_get(monkeypatch, tmp_path):
    source = "def m(answers, references, rows):\n    answers.sort(); rows.clear(); references.pop()\n    return 1\n"
    packages.install(monkeypatch, tmp_path / "a", "sorts", f"{source}m.higher_is_better = True", "m")
    before = [dict(sample) for sample in SAMPLES]
    assert user_metrics.score(["m", "m"], SAMPLES, ROWS) == ({"m": 1.0}, {})
    assert (before, len(ROWS)) == (SAMPLES, 3)


def test_metrics_score_each_answer_or_fail_alone(monkeypatch, tmp_path, caplog):
    packages.install(monkeypatch, tmp_path / "a", "own_scores", packages.METRICS, "shared_words length away")
    names = ["away", "shared_words", "length"]
    facts = user_metrics.try_out(names, ROWS[:2])
    assert [facts[name].higher_is_better for name in names] == [True, True, False]
    assert (facts["length"].unit, facts["length"].package) == ("characters", "own_scores")
    scores, failed = user_metrics.score(names, SAMPLES, ROWS)
    assert scores == {"shared_words": [1.0, 0.5, 0.0], "length": [0.0, 2.0, 3.0]}
    assert failed == {"away": "ConnectionError: the judge"}
    assert "metric away is not measured, because it failed" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("m = 3", "of the type int, not a function"),
        ("class m: higher_is_better = True", "of the type class, not a function"),
        ("def m(answers): return 1", "must take the arguments answers, references"),
        ("def m(answers, references, model): return 1", "must take the arguments answers, references"),
        ("def m(answers, references): return 1", "set m.higher_is_better = True"),
        ("def m(answers, references): return 1\nm.higher_is_better = 'yes'", "does not say what is better"),
        ("def m(*texts): return 1\nm.higher_is_better = True\nm.range = (1, 0)", r"has the range \(1, 0\)"),
        ("def m(*texts): return 1\nm.higher_is_better = True\nm.range = 5", "has the range 5"),
        ("def m(*texts): return 1\nm.higher_is_better = True\nm.unit = 5", "has the unit 5"),
        ("def m(a, b): return [1 / len(x) for x in a]\nm.higher_is_better = True", "one empty: ZeroDivisionError"),
        ("def m(a, b): raise SystemExit(2)\nm.higher_is_better = True", "one empty: SystemExit: 2"),
        ("def m(a, b): return 2\nm.higher_is_better = True\nm.range = (None, 1)", "from -inf to 1"),
    ],
)
def test_metric_that_cannot_work_is_refused_before_it_costs_time(source: str, message: str, monkeypatch, tmp_path):
    package = f"refused_{abs(hash(source))}"
    packages.install(monkeypatch, tmp_path / "a", package, source, "m")
    with pytest.raises(ConfigError, match=message) as error:
        user_metrics.try_out(["m"])
    assert str(error.value).startswith(f"evaluation.metrics: m of {package} 0.1")
    assert "\n" not in str(error.value)


def test_metric_that_needs_rows_is_not_called_without_them(monkeypatch, tmp_path):
    packages.install(monkeypatch, tmp_path / "a", "needs_rows", packages.METRICS, "length")
    assert user_metrics.try_out(["length"])["length"].higher_is_better is False
    with pytest.raises(ConfigError, match="length of needs_rows 0.1 fails on two answers.*KeyError"):
        user_metrics.try_out(["length"], [{"prompt": ""}, {"prompt": ""}])


def test_metrics_are_not_imported_if_nothing_is_answered():
    config = SimpleNamespace(metrics=["rouge", "x", "x"], generate_rows=0)
    assert user_metrics.of_config(config) == []
    config.generate_rows = 2
    assert user_metrics.of_config(config) == ["x"]


def test_package_of_the_documentation_works(monkeypatch, tmp_path):
    page = (Path(__file__).parents[4] / "docs" / "how_to" / "add_a_metric.md").read_text("utf-8")
    metric, loss = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    first, second = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    points = first["project"]["entry-points"] | second["project"]["entry-points"]
    assert points == {
        "qlora_exp.metrics": {"shared_words": "words_metrics:shared_words"},
        "qlora_exp.losses": {"focal": "words_metrics:focal"},
    }
    packages.install(monkeypatch, tmp_path / "a", "words_metrics", metric + loss, "shared_words", "focal")
    assert user_metrics.try_out(["shared_words"])["shared_words"].unit == "share"
    assert user_losses.load("focal").facts.package == "words_metrics"
