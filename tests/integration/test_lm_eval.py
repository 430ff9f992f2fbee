"""Runs that are scored by tasks of lm-eval, and comparisons of them by item."""

import json
import shutil

import pytest
from helpers.lm_eval_tasks import task_overrides

from qlora_exp.results import compare, records, verdicts
from qlora_exp.utils.errors import ConfigError


def test_run_scores_lm_eval_tasks_before_and_after_training(run_quick, task_folder):
    result = run_quick("method=lora", "evaluation=loss_only", "evaluation.before=true", *task_overrides(task_folder))
    told = json.loads((result.output_dir / "evaluation" / "after_lm_eval.json").read_text())
    items = told["items"]
    assert (told["groups"], told["lower_is_better"]) == ({}, [])
    assert len(items) == 10
    assert sum(item["acc"] for item in items) / 10 == pytest.approx(result.metrics["after/lm_eval/sums/acc"])
    assert "before/lm_eval/sums/acc" in result.metrics


def test_runs_are_compared_by_lm_eval_item(run_quick, task_folder, mlflow_uri):
    name = "tracking.experiment_name=harness"
    for rate in ("1e-4", "1e-1"):
        run_quick(
            "method=lora", "evaluation=loss_only", name, f"training.learning_rate={rate}", *task_overrides(task_folder)
        )
    found = compare.compare(records.find(mlflow_uri, [], "harness"), "lm_eval/sums/acc")
    assert verdicts.difference(*found.rows, "lm_eval/sums/acc").items == 10


GROUP = """\
group: all_sums
task: [sums, worse]
aggregate_metric_list: [{metric: acc, aggregation: mean}]
"""


def test_lm_eval_groups_and_directions_are_recorded(task_folder, run_quick, mlflow_uri):
    text = (task_folder / "sums.yaml").read_text()
    (task_folder / "worse.yaml").write_text(
        text.replace("task: sums", "task: worse").replace("better: true", "better: false")
    )
    (task_folder / "group.yaml").write_text(GROUP)
    name = "tracking.experiment_name=groups"
    run_quick(
        "method=lora", "evaluation=loss_only", name, *task_overrides(task_folder), "evaluation.lm_eval_tasks=[all_sums]"
    )
    (record,) = records.find(mlflow_uri, [], "groups")
    found = compare.compare([record], "lm_eval/all_sums/acc")
    assert verdicts.difference(found.rows[0], found.rows[0], "lm_eval/all_sums/acc").items == 20
    assert record.lm_eval["lower_is_better"] == ["lm_eval/worse/acc"]
    assert compare.compare([record], "lm_eval/worse/acc").lower_is_better
    assert not compare.compare([record], "lm_eval/sums/acc").lower_is_better


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["evaluation.lm_eval_tasks=[summs]"], "lm-eval has no summs and"),
        (["evaluation.lm_eval_include_path=gone"], "no folder gone"),
    ],
)
def test_unknown_lm_eval_task_is_rejected_before_the_model_is_loaded(
    changes, message: str, task_folder, run_quick, monkeypatch, tmp_path
):
    (tmp_path / "theirs").mkdir()  # in the place of all tasks of lm-eval, which take seconds to index
    shutil.copy(task_folder / "sums.yaml", tmp_path / "theirs" / "more.yaml")
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "theirs" / "manager.py"))
    monkeypatch.setattr("qlora_exp.models.base.load_model", None)
    with pytest.raises(ConfigError, match=message):
        run_quick("method=lora", *task_overrides(task_folder), *changes)
