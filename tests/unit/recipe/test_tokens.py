"""What is known of a run before its model is loaded."""

import logging

import pytest
from datasets import Dataset

from qlora_exp.planning.gpus import Gpu
from qlora_exp.recipe import tokens


@pytest.mark.parametrize(("gib", "warns"), [(1.0, True), (3.0, False)])
def test_run_that_is_planned_to_exceed_its_device_is_warned_of(gib, warns, make_config, monkeypatch, caplog):
    device = Gpu("a CPU", gib, type="cpu", limited_by="ulimit -v")
    monkeypatch.setattr(tokens.gpus, "here", lambda config, vram: device)
    with caplog.at_level(logging.WARNING):
        tokens._warn_of(2048.0, make_config())
    says = "planned to take 2.0 GiB, and 0.6 more for libraries, and has only 1 GiB (a CPU, as ulimit -v allows)"
    assert (says in caplog.text) == warns


@pytest.mark.parametrize(
    ("rows", "words", "warns"),
    [
        ([("Can I?", "Yes, you can")], [], True),
        ([("Can I?", "Yes"), ("Why", "So"), ("Ends here. ", "no")], [], True),
        ([("Can I?", " Yes")], [], False),
        ([("Question: can I?\nAnswer:", "Yes")], [], False),
        ([("Can I?\n\n###\n\n", "Yes")], [], False),
        ([("", "all of a text")], [], False),
        ([("Can I?", "Yes")], ["dataset.format=chat"], False),
        ([("Can I?", "Yes")], ["dataset.format=alpaca"], False),
    ],
)
def test_answers_that_follow_prompts_with_nothing_between_are_warned_of(rows, words, warns, make_config, caplog):
    config = make_config("dataset=own", "dataset.path=rows.jsonl", "dataset.format=prompt_completion", *words)
    with caplog.at_level(logging.WARNING):
        tokens._warn_of_glued(Dataset.from_list([{"prompt": a, "input": "", "completion": b} for a, b in rows]), config)
    assert ("nothing stands between prompt and answer" in caplog.text) == warns


def test_source_of_a_mixture_is_warned_of_by_its_own_format(make_config, caplog):
    sources = [f"dataset.sources.{name}={{path: {name}.jsonl, format: {form}}}"
               for name, form in (("a", "alpaca"), ("b", "prompt_completion"))]  # fmt: skip
    config = make_config("dataset=own", "dataset.format=prompt_completion", *sources)
    row = {"prompt": "Can I?", "input": "", "completion": "Yes"}
    for names, warns in (("aaa", False), ("aab", True), ("bbb", True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tokens._warn_of_glued(Dataset.from_list([row | {tokens.SOURCE: name} for name in names]), config)
        assert ("nothing stands between" in caplog.text) == warns


@pytest.mark.parametrize(
    ("words", "rows", "says"),
    [
        ([], 400, "30 steps of 4 rows, so 120 of 400: training.max_steps=-1 trains on all"),
        ([], 120, "30 steps of 4 rows"),
        (["training.max_steps=-1", "training.num_train_epochs=2"], 400, "200 steps of 4 rows"),
        (["training.max_steps=-1", "training.num_train_epochs=0.5"], 400, "50 steps of 4 rows, so 200 of 400"),
        (["training.gradient_accumulation_steps=4"], 4000, "30 steps of 16 rows, so 480 of 4,000: "
         "training.max_steps=-1 trains on all"),
    ],
)  # fmt: skip
def test_run_says_how_many_of_the_rows_its_steps_see(words, rows, says, make_config, caplog):
    usual = ["training.max_steps=30", "training.per_device_train_batch_size=4"]
    with caplog.at_level(logging.INFO):
        tokens._log_steps(make_config(*usual, *words), rows)
    assert caplog.messages[0] == says


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        (["training.max_steps=199"], False),
        (["training.max_steps=200"], True),
        (["training.max_steps=200", "training.save_strategy=steps", "training.save_steps=50"], False),
        (["training.max_steps=-1", "training.num_train_epochs=200"], True),
    ],
)
def test_many_steps_without_a_checkpoint_are_warned_of(words, warns, make_config, caplog):
    tokens._log_steps(make_config("training.per_device_train_batch_size=4", *words), 4)
    assert ("no checkpoint is saved" in caplog.text) == warns
