"""Warnings about the answers of a trained model."""

import logging
from types import SimpleNamespace

import pytest

from qlora_exp.recipe.measure import log_changes


@pytest.mark.parametrize(("answers", "warns"), [(["", " "], True), (["", "a", "b"], False), ([], False)])
def test_empty_answers_are_warned_of(answers, warns, caplog):
    samples = [{"prompt": "a?", "reference": "a", "answer": answer} for answer in answers]
    run = SimpleNamespace(tracker=SimpleNamespace(table=lambda *_: None, json=lambda *_: None))
    with caplog.at_level(logging.WARNING):
        log_changes(run, None, SimpleNamespace(metrics={}, samples=samples))
    assert ("2 of 2 answers after training are empty" in caplog.text) == warns
