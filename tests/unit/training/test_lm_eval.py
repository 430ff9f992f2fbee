"""lm-eval's tasks on files of one's own: scores, items, and comparisons by item."""

import pytest
from helpers.lm_eval_tasks import task_overrides
from lm_eval.models.huggingface import HFLM

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
