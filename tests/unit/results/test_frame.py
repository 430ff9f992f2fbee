"""Past runs as data frames."""

import pandas as pd
import pytest

import qlora_exp
from qlora_exp.utils.errors import TrackingError


def test_every_run_is_a_row_with_typed_values(past_runs):
    metrics = {"steps": 3.0}
    ids = [past_runs([3.0], seed=1, method__r=4, method__target_modules=["q", "v"], metrics=metrics)]
    ids += [past_runs(seed=2, method__r=8, training__bf16=True, outcome="oom", tags={"sweep": "ranks"})]
    ids += [past_runs([2.0], seed=1, method__r=4, model__name="1e", tags={"reproduces": ids[0]})]
    frame = qlora_exp.runs(experiment=past_runs.experiment, uri=past_runs.uri)
    assert list(frame.index) == ids[::-1]  # newest first
    assert frame.loc[ids, "method.r"].tolist() == [4, 8, 4]
    assert frame["method.r"].sum() == 16
    assert frame.loc[ids[0], "method.target_modules"] == ["q", "v"]
    assert frame.loc[ids[1], "training.bf16"] is True
    assert frame.loc[ids[2], "model.name"] == "1e"
    assert frame.loc[ids, "outcome"].tolist() == ["ok", "oom", "ok"]
    assert frame.loc[ids[0], ["after/loss", "steps"]].tolist() == [3.0, 3.0]
    assert frame["steps"].isna().tolist() == [True, True, False]
    assert frame.loc[ids[1], "sweep"] == "ranks"
    assert frame.loc[ids[0], "start_time"] == pd.Timestamp(1, unit="ms", tz="UTC")


def test_runs_are_chosen_by_name_and_by_filter(past_runs):
    ids = [past_runs([3.0], seed=seed, tags={"sweep": "one"} if seed < 3 else None) for seed in (1, 2, 3)]
    chosen = {"uri": past_runs.uri, "experiment": past_runs.experiment}
    assert set(qlora_exp.runs("one", **chosen).index) == set(ids[:2])
    assert list(qlora_exp.runs(ids[2], ids[2], **chosen).index) == ids[2:]
    assert list(qlora_exp.runs(where="params.seed = '2'", **chosen).index) == [ids[1]]
    assert qlora_exp.runs(where="params.seed = '9'", **chosen).empty
    with pytest.raises(TrackingError, match="has no experiment 'nothing'"):
        qlora_exp.runs(experiment="nothing", uri=past_runs.uri)


def test_curves_have_a_column_for_each_run(past_runs):
    ids = [past_runs([3.0]), past_runs([2.0])]
    for step, value in ((1, 5.0), (2, 4.0)):
        past_runs.mlflow.log_metric(ids[0], "train/loss", value, step=step)
    past_runs.mlflow.log_metric(ids[1], "train/loss", 3.0, step=2)
    curves = qlora_exp.curves(ids, uri=past_runs.uri)
    assert curves[ids[0]].tolist() == [5.0, 4.0]
    assert curves[ids[1]].dropna().to_dict() == {2: 3.0}
    assert curves.index.name == "step"


def test_comparison_is_a_frame_of_numbers(past_runs):
    for rank, loss in ((4, 3.0), (8, 2.0)):
        for seed in (1, 2, 3):
            past_runs([loss + seed / 100, loss + 0.1], seed=seed, method__r=rank)
    past_runs(seed=1, method__r=16, outcome="oom")
    frame = qlora_exp.compare(experiment=past_runs.experiment, uri=past_runs.uri, baseline="r=4")
    assert frame["method.r"].tolist() == ["4", "8", "16"]
    assert frame["seeds"].tolist() == [3, 3, 0]
    assert frame["failed"].tolist() == [0, 0, 1]
    assert frame["difference"].tolist()[1] == pytest.approx(-1.0)
    assert frame["after/loss low"][0] < frame["after/loss"][0] < frame["after/loss high"][0]
    assert frame[["difference", "verdict"]].isna().all(axis=1).tolist() == [True, False, True]
