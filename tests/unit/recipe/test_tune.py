"""A choice of how steps are computed is kept, and made again where what it depends on has changed."""

from dataclasses import replace

import pytest
from helpers.planning import ARCHITECTURE

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import detect, resolve
from qlora_exp.planning import calibration, gpus, tuning
from qlora_exp.recipe import tune

FIT = calibration.Calibration("a CPU", 3, 0.0, 1.0, 0.01, 0.02)


def test_choice_is_kept_until_what_it_depends_on_changes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    config = compose(["model=tiny_llama", ARCHITECTURE, "device=cpu", "training.tune=auto"])
    resolved, made, fits = resolve(config, detect("cpu")), [], [FIT]

    def choose(*arguments):
        made.append(arguments)
        return tuning.Choice(4, 1, False, False, 1.0, 2**30, True)

    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "measured", lambda *_: None)
    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(calibration, "read", lambda: [replace(fit, device=resolved.device_name) for fit in fits])
    assert tune._choice(config, resolved, [8, 4], 8) == tune._choice(config, resolved, [4, 8], 8)
    assert len(made) == 1
    monkeypatch.setattr(tune.torch, "get_num_threads", lambda: 999)
    tune._choice(config, resolved, [8, 4], 8)
    fits[0] = replace(FIT, slope=1.5)
    tune._choice(config, resolved, [8, 4], 8)
    assert len(made) == 3


def test_kept_choice_is_compared_with_the_memory_that_is_free_now(tmp_path, monkeypatch: pytest.MonkeyPatch):
    config = compose(["model=tiny_llama", ARCHITECTURE, "device=cpu", "training.tune=auto"])
    resolved = resolve(config, detect("cpu"))
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "measured", lambda *_: None)
    monkeypatch.setattr(tuning, "choose", lambda *_: tuning.Choice(4, 1, False, False, 1.0, 2**30, True))
    free = gpus.this_cpu()
    for gib, fits in ((8.0, True), (1.0, False), (8.0, True)):
        monkeypatch.setattr(tune, "_with_free_memory", lambda _, gib=gib: replace(free, memory_gib=gib))
        assert tune._choice(config, resolved, [8, 4], 8).fits is fits
