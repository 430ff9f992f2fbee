"""lm-eval's tasks on files of one's own: scores, items, and comparisons by item."""

import json
from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM

from qlora_exp.config.hydra_compose import compose
from qlora_exp.models.base import load_unquantized
from qlora_exp.results import compare, records
from qlora_exp.tracking import run_key
from qlora_exp.training.lm_eval import evaluate, load_tasks
from qlora_exp.utils.errors import ConfigError

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}} ="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a task of ten items."""
    rows = [{"question": f"{n} + 1", "choices": [str(n + 1), str(n + 2)], "answer": n % 2} for n in range(10)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(rows=tmp_path / "tasks" / "rows.jsonl"))
    return tmp_path / "tasks"


def words(folder: Path) -> list[str]:
    return ["evaluation.lm_eval_tasks=[sums]", f"evaluation.lm_eval_include_path={folder}"]


def test_a_run_scores_its_tasks_before_and_after_and_keeps_each_item(run, folder):
    result = run("method=lora", "evaluation=loss_only", "evaluation.before=true", *words(folder))
    told = json.loads((result.output_dir / "evaluation" / "after_lm_eval.json").read_text())
    items = told["items"]
    assert (told["groups"], told["lower_is_better"]) == ({}, [])
    assert len(items) == 10
    assert sum(item["acc"] for item in items) / 10 == pytest.approx(result.metrics["after/lm_eval/sums/acc"])
    assert "before/lm_eval/sums/acc" in result.metrics


def test_runs_are_compared_by_item(run, folder, store):
    name = "tracking.experiment_name=harness"
    for rate in ("1e-4", "1e-1"):
        run("method=lora", "evaluation=loss_only", name, f"training.learning_rate={rate}", *words(folder))
    found = compare.compare(records.find(store, [], "harness"), "lm_eval/sums/acc")
    items, _ = compare._items(found.rows[0], "lm_eval/sums/acc")
    assert [values.shape for values in items.values()] == [(1, 10, 2)]


def test_the_harness_takes_some_of_the_items_if_told_to(folder, tokenizer):
    config = compose([*words(folder), "evaluation.lm_eval_limit=3", "evaluation.lm_eval_num_fewshot=0"])
    model = load_unquantized(compose(["model=tiny_llama"]).model)
    scores, told = evaluate(model, tokenizer, load_tasks(config.evaluation), config.evaluation, 2)
    assert len(told["items"]) == 3
    assert scores.keys() == {"lm_eval/sums/acc"}


def test_examples_in_the_prompt_are_the_same_each_time(folder, tokenizer, monkeypatch):
    config = compose([*words(folder), "evaluation.lm_eval_num_fewshot=2"]).evaluation
    tasks, model = load_tasks(config), load_unquantized(compose(["model=tiny_llama"]).model)
    asked: list[list[str]] = []
    score = HFLM.loglikelihood

    def listen(self, requests, *arguments, **options):
        asked.append([request.args[0] for request in requests])
        return score(self, requests, *arguments, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", listen)
    for _ in range(2):
        evaluate(model, tokenizer, tasks, config, 2)
    assert asked[0] == asked[1]
    assert asked[0][0].count("=") == 3


GROUP = """\
group: all_sums
task: [sums, worse]
aggregate_metric_list: [{metric: acc, aggregation: mean}]
"""


def test_groups_and_what_is_better_low_are_as_lm_eval_says(folder, run, store):
    text = (folder / "sums.yaml").read_text()
    (folder / "worse.yaml").write_text(
        text.replace("task: sums", "task: worse").replace("better: true", "better: false")
    )
    (folder / "group.yaml").write_text(GROUP)
    name = "tracking.experiment_name=groups"
    run("method=lora", "evaluation=loss_only", name, *words(folder), "evaluation.lm_eval_tasks=[all_sums]")
    (record,) = records.find(store, [], "groups")
    found = compare.compare([record], "lm_eval/all_sums/acc")
    assert next(iter(compare._items(found.rows[0], "lm_eval/all_sums/acc")[0].values())).shape == (1, 20, 2)
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
def test_what_is_not_there_is_refused_before_the_model_is_loaded(changes, message: str, folder, run, monkeypatch):
    monkeypatch.setattr("qlora_exp.models.base.load_model", None)
    with pytest.raises(ConfigError, match=message):
        run("method=lora", *words(folder), *changes)


def test_without_its_package_the_user_is_told(monkeypatch, folder):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"pip install 'qlora-exp\[lm-eval\]'"):
        load_tasks(compose(words(folder)).evaluation)


def test_other_tasks_are_another_run(folder):
    before = run_key.parts(compose(words(folder)))
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write('{"question": "1 + 1", "choices": ["2", "3"], "answer": 0}\n')
    after = run_key.parts(compose(words(folder)))
    assert {part for part in before if before[part] != after[part]} == {"data"}
