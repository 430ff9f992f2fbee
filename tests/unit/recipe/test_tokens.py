"""What is known of a run before its model is loaded."""

import logging

import pytest

from qlora_exp.planning.gpus import Gpu
from qlora_exp.recipe import tokens


@pytest.mark.parametrize(("gib", "warns"), [(1.0, True), (3.0, False)])
def test_run_that_is_planned_to_exceed_its_device_is_warned_of(gib, warns, make_config, monkeypatch, caplog):
    device = Gpu("a CPU", gib, type="cpu", limited_by="ulimit -v")
    monkeypatch.setattr(tokens.gpus, "here", lambda config, vram: device)
    with caplog.at_level(logging.WARNING):
        tokens._warn_of(2048.0, make_config())
    says = "planned to take 2.0 GiB, more than there are of 1 GiB (a CPU, as ulimit -v allows)"
    assert (says in caplog.text) == warns
