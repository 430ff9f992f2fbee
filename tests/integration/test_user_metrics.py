"""A run with a metric and a loss of installed packages, from the config to its record."""

import json
from dataclasses import replace

import pytest
from helpers import plugins as packages

from qlora_exp.recipe.summary import markdown
from qlora_exp.results import bundle, listing
from qlora_exp.results.compare import compare
from qlora_exp.results.records import find
from qlora_exp.results.reproduce import judge, recorded_config
from qlora_exp.utils.errors import ConfigError

pytestmark = pytest.mark.slow


def test_run_with_a_metric_and_a_loss_of_a_package_is_recorded_compared_and_shared(
    run_quick, mlflow_uri, tmp_path, monkeypatch, capsys
):
    source = packages.METRICS.replace("len(calls) > 1", "len(calls) > 2") + packages.LOSSES  # tried out, then before
    packages.install(monkeypatch, tmp_path / "own", "whole_run", source, "shared_words length away", "focal")
    words = ["method=lora", "tracking.experiment_name=own metrics", "training.loss_type=focal"]
    result = run_quick(*words, "evaluation.metrics=[exact_match,shared_words,length,away]")
    assert {"before/metric/length", "after/metric/length", "before/metric/away"} <= result.metrics.keys()
    assert "after/metric/away" not in result.metrics  # it failed, and the run went on
    table = [
        line for line in markdown(result.metrics).splitlines() if line.startswith(("| metric/away", "| metric/length"))
    ]
    assert [line.count(" - ") for line in table] == [1, 0]

    (record,) = find(mlflow_uri, [], "own metrics")
    assert record.tags["metric_failed.after.away"] == "ConnectionError: the judge"
    assert json.loads(record.tags["loss.focal"])["package"] == "whole_run"
    assert "metric/length" in record.answers[0]
    bundle.write(record, tmp_path / "shared")
    shared = bundle.read(tmp_path / "shared")
    assert shared.tags["metric_failed.after.away"] == record.tags["metric_failed.after.away"]
    changes = {"evaluation.metrics": ["exact_match"]}
    with pytest.raises(ConfigError, match="which only you may choose"):
        recorded_config(shared, {}, mlflow_uri)
    with pytest.raises(ConfigError, match="training.loss_type=nll to do without it"):
        recorded_config(shared, changes, mlflow_uri)
    config = recorded_config(shared, changes | {"training.loss_type": "nll"}, mlflow_uri)
    left_out = {name: value for name, value in record.metrics.items() if "/metric/" not in name}
    assert judge(record, replace(record, metrics=left_out), config).grade == "bit-identical"
    listing.show_one(record)
    assert "away was not measured after training: ConnectionError: the judge" in capsys.readouterr().out
    (row,) = compare([record], "metric/length").rows
    assert row.mean("after/metric/length").value == result.metrics["after/metric/length"]
