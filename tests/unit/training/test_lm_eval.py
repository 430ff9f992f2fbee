"""lm-eval's tasks on files of one's own: scores, items, and comparisons by item."""

from types import SimpleNamespace

import pytest
from helpers.lm_eval_tasks import task_overrides
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from qlora_exp.config.hydra_compose import compose
from qlora_exp.models.base import load_unquantized
from qlora_exp.tracking import run_key
from qlora_exp.training.lm_eval import evaluate, load_tasks
from qlora_exp.utils.errors import ConfigError

pytestmark = pytest.mark.slow


def test_lm_eval_limit_reduces_items(task_folder, tiny_tokenizer):
    config = compose([*task_overrides(task_folder), "evaluation.lm_eval_limit=3", "evaluation.lm_eval_num_fewshot=0"])
    model = load_unquantized(compose(["model=tiny_llama"]).model)
    scores, told = evaluate(model, tiny_tokenizer, load_tasks(config.evaluation), config.evaluation, 2)
    assert len(told["items"]) == 3
    assert scores.keys() == {"lm_eval/sums/acc"}


def test_fewshot_examples_are_deterministic(task_folder, tiny_tokenizer, monkeypatch):
    config = compose([*task_overrides(task_folder), "evaluation.lm_eval_num_fewshot=2"]).evaluation
    tasks, model = load_tasks(config), load_unquantized(compose(["model=tiny_llama"]).model)
    asked: list[list[str]] = []
    score = HFLM.loglikelihood

    def listen(self, requests, *arguments, **options):
        asked.append([request.args[0] for request in requests])
        return score(self, requests, *arguments, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", listen)
    for _ in range(2):
        evaluate(model, tiny_tokenizer, tasks, config, 2)
    assert asked[0] == asked[1]
    assert asked[0][0].count("=") == 3


def test_missing_lm_eval_package_is_named(monkeypatch, task_folder):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"pip install 'qlora-exp\[lm-eval\]'"):
        load_tasks(compose(task_overrides(task_folder)).evaluation)


def test_changed_lm_eval_task_changes_the_run_key(task_folder):
    before = run_key.digests(compose(task_overrides(task_folder)))
    with (task_folder / "rows.jsonl").open("a") as rows:
        rows.write('{"question": "1 + 1", "choices": ["2", "3"], "answer": 0}\n')
    after = run_key.digests(compose(task_overrides(task_folder)))
    assert {part for part in before if before[part] != after[part]} == {"data"}


def test_names_of_scores_and_items_are_valid_metric_names(monkeypatch):
    results = {"qa (v2)": {"recall@5,none": 0.5, "recall-5,none": 0.25, "alias": "x"}, "all": {"acc,a=b": 1.0}}
    sample = {"doc_hash": "d" * 64, "metrics": ["recall@5", "recall-5"], "filter": "none", "recall@5": 1, "recall-5": 0}
    output = {
        "results": results, "samples": {"qa (v2)": [sample]}, "group_subtasks": {"all": ["qa (v2)"], "qa (v2)": []},
        "higher_is_better": {"qa (v2)": {"recall@5": False}},
    }  # fmt: skip
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: output)
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", lambda **_: None)
    scores, told = evaluate(SimpleNamespace(generation_config=GenerationConfig()), None, {}, compose([]).evaluation, 2)
    renamed, kept, filtered = scores
    assert (kept, filtered) == ("lm_eval/qa -v2-/recall-5", "lm_eval/all/acc/a-b")
    assert renamed.startswith("lm_eval/qa -v2-/recall-5-")
    assert list(scores.values()) == [0.5, 0.25, 1.0]
    (item,) = told["items"]
    assert (item["task"], item[renamed.rpartition("/")[2]], item["recall-5"]) == ("qa -v2-", 1, 0)
    assert (told["groups"], told["lower_is_better"]) == ({"all": ["qa -v2-"]}, [renamed])
