import json

from qlora_exp.tracking.stores import mlflow_views

ALL, SWEEP = "mlflow.sharedViewState.qlora_exp_all_runs", "mlflow.sharedViewState.qlora_exp_newest_sweep"


def state(view: tuple[str, str]) -> dict:
    return json.loads(json.loads(view[1])["state"])


def test_view_of_a_sweep_shows_swept_keys_before_metrics():
    key, _ = view = mlflow_views.newest_sweep("night", ["method.r", "seed"], 5)
    found = state(view)
    assert key == SWEEP
    assert found["selectedColumns"][:3] == ["tags.`sweep.method.r`", "tags.`sweep.seed`", "metrics.`after/loss`"]
    assert found["columnOrder"][1:] == found["selectedColumns"]
    assert (found["orderByKey"], found["orderByAsc"]) == ("metrics.`after/loss`", True)


def test_view_of_all_runs_excludes_sweep_parents():
    key, _ = view = mlflow_views.all_runs()
    assert key == ALL
    assert state(view)["searchFilter"] == "tags.run_key LIKE '%'"


def test_older_view_is_recognized():
    monday, tuesday = (mlflow_views.newest_sweep("day", [], now)[1] for now in (1, 2))
    assert mlflow_views.is_older(monday, tuesday)
    assert not mlflow_views.is_older(tuesday, monday)
    assert not any(mlflow_views.is_older(monday, other) for other in (None, monday, "", "[]", "{}", "null"))


def test_views_fit_into_a_tag():
    every = [f"method.a_rather_long_key_of_peft_{number}" for number in range(50)]
    assert all(
        len(view[1]) < 20_000 for view in (mlflow_views.all_runs(), mlflow_views.newest_sweep("n" * 100, every, 5))
    )


def test_address_opens_the_newest_view():
    base = "http://h:5000/#/experiments/3/runs?workflowType=machine_learning"
    both = [ALL, SWEEP, "other"]
    sweep, runs = "&viewStateShareKey=qlora_exp_newest_sweep", "&viewStateShareKey=qlora_exp_all_runs"
    assert mlflow_views.address("http://h:5000/", "3", both, newest_is_sweep=True) == base + sweep
    assert mlflow_views.address("http://h:5000", "3", both, newest_is_sweep=False) == base + runs
    assert mlflow_views.address("http://h:5000", "3", [ALL], newest_is_sweep=True) == base + runs
    assert mlflow_views.address("http://h:5000", "3", [], newest_is_sweep=True) == base


def test_view_of_a_sweep_has_columns_for_the_first_scores():
    scores = [f"after/lm_eval/task{number:02}/acc" for number in range(30)]
    columns = state(mlflow_views.newest_sweep("night", ["seed"], 5, scores))["selectedColumns"]
    assert columns[:2] == ["tags.`sweep.seed`", "metrics.`after/lm_eval/task00/acc`"]
    assert "metrics.`after/lm_eval/task19/acc`" in columns
    assert "metrics.`after/lm_eval/task20/acc`" not in columns
    assert {"metrics.`after/exact_match`", "metrics.`forgetting`"} <= {*columns}
