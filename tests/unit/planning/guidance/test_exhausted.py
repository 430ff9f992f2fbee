"""A run that is out of memory ends with settings that would fit."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning.calibration import Calibration
from qlora_exp.planning.fit import needed_for, room
from qlora_exp.planning.gpus import Gpu
from qlora_exp.planning.guidance import exhausted
from qlora_exp.planning.planner import planner
from qlora_exp.utils.errors import MemoryExhaustedError, RankError, UserError, is_out_of_memory

TINY = ["model=tiny_llama", "method=lora", "device=cpu", "training.max_length=256"]
FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("error", [FULL, MemoryError(), RankError(1, "it had none", "oom")])
def test_error_about_memory_says_what_would_fit(error, monkeypatch):
    monkeypatch.setattr(exhausted, "advice", lambda config, longest: f"it would fit with {longest}")
    says = r"^out of memory; it would fit with 7 \(.+\)$"
    with pytest.raises(MemoryExhaustedError, match=says) as raised, exhausted.explained(compose(TINY), lambda: 7):
        raise error
    assert raised.value.__cause__ is error
    assert is_out_of_memory(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [ValueError("no"), UserError("no"), RankError(1, "no", "error"), KeyboardInterrupt()])
def test_other_errors_stay(error, monkeypatch):
    monkeypatch.setattr(exhausted, "advice", lambda *_: pytest.fail("nothing to advise on"))
    with pytest.raises(type(error)) as raised, exhausted.explained(compose(TINY)):
        raise error
    assert raised.value is error


def test_what_the_run_held_is_freed_before_plans_are_made(monkeypatch):
    class Model:
        pass

    alive = []

    def train() -> None:
        model = Model()
        alive.append(exhausted.gc.is_tracked(model))
        raise FULL

    def advice(config, longest) -> str:
        return f"{sum(isinstance(each, Model) for each in exhausted.gc.get_objects())} models"

    monkeypatch.setattr(exhausted, "advice", advice)
    with pytest.raises(MemoryExhaustedError, match="; 0 models"), exhausted.explained(compose(TINY)):
        train()


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, SystemExit])
def test_run_stays_out_of_memory_if_the_advice_is_interrupted(interrupted, monkeypatch):
    def advice(*_: object) -> None:
        raise interrupted

    monkeypatch.setattr(exhausted, "advice", advice)
    says = "^out of memory; less memory is taken with"
    with pytest.raises(MemoryExhaustedError, match=says), exhausted.explained(compose(TINY)):
        raise FULL


@pytest.mark.parametrize(
    ("capacity", "free_share", "by"),
    [(0.5, 0.5, "ulimit -v"), (0.5, 0.4, ""), (2.0, 2.0, "")],  # others may have the memory, or the plan was too low
)
def test_limit_is_named_only_if_it_is_what_leaves_too_little(capacity, free_share, by, monkeypatch):
    config, cpu = compose([*TINY, "training.per_device_train_batch_size=64"]), Gpu("CPU", 0, type="cpu")
    peak = planner(config, cpu.device).predict().peak
    limits: list[str] = []
    monkeypatch.setattr(exhausted, "here", lambda *_: Gpu("CPU", 1, type="cpu", limited_by="ulimit -v"))
    monkeypatch.setattr(exhausted, "free", lambda: needed_for(free_share * peak, cpu) * 2**30)
    monkeypatch.setattr(exhausted, "capacity", lambda: (needed_for(capacity * peak, cpu) * 2**30, "ulimit -v"))
    monkeypatch.setattr(exhausted.remedies, "remedies", lambda config, gpu: limits.append(gpu.limited_by) or [])
    exhausted.planned(config, None)
    assert limits == [by]


@pytest.mark.parametrize("free_share", [2.0, 0.5])
def test_less_is_planned_than_ran_out_and_than_is_free(free_share, monkeypatch):
    config, cpu = compose([*TINY, "training.per_device_train_batch_size=64"]), Gpu("CPU", 0, type="cpu")
    peak = planner(config, cpu.device).predict().peak
    rooms: list[float] = []
    monkeypatch.setattr(exhausted, "free", lambda: needed_for(free_share * peak, cpu) * 2**30)
    monkeypatch.setattr(exhausted.remedies, "remedies", lambda config, gpu: rooms.append(gpu.memory_gib) or [])
    exhausted.planned(config, None)
    assert rooms == pytest.approx([needed_for(min(0.9, free_share) * peak, cpu)])


@pytest.mark.thorough
def test_settings_are_planned_to_fit_and_keep_the_rows_of_a_step():
    words = [*TINY, "training.per_device_train_batch_size=64", "training.gradient_accumulation_steps=2"]
    config = compose(words)
    peak = planner(config, Gpu("CPU", 0, type="cpu").device).predict().peak
    advice = exhausted.planned(config, None)
    assert advice.startswith("it should fit with ")
    for option in advice.removeprefix("it should fit with ").split(", or with "):
        changed = compose([*words, *option.split()])
        training = changed.training
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
        assert planner(changed, Gpu("CPU", 0, type="cpu").device).predict().peak < peak


@pytest.mark.parametrize("fit", [None, Calibration("GPU", 3, 200.0, 1.2, 0.02, 0.05, None, None)])
def test_room_of_the_memory_that_a_peak_needs_is_the_peak(fit):
    gpu = Gpu("GPU", 1.0, calibration=fit)
    needed = Gpu("GPU", needed_for(3e9, gpu), calibration=fit)
    assert room(needed) == pytest.approx(3e9)


@pytest.mark.parametrize("output", ["", "no JSON", None])
def test_without_plans_the_advice_is_general(output, monkeypatch):
    def run(*_, **__):
        if output is None:
            raise subprocess.CalledProcessError(-9, "plan")
        return SimpleNamespace(stdout=output)

    monkeypatch.setattr(subprocess, "run", run)
    text = exhausted.advice(compose(["model=tiny_llama", "method=full", "training.gradient_accumulation_steps=3"]))
    assert "per_device_train_batch_size=1 training.gradient_accumulation_steps=" in text
    assert "gradient_checkpointing=true" in text
    assert "method=qlora" in text


def test_rows_that_are_shorter_are_planned_as_they_are(monkeypatch):
    asked = []

    def run(command, input, **_):
        asked.append(json.loads(input))
        return SimpleNamespace(stdout='noise\n"it would fit"\n')

    monkeypatch.setattr(subprocess, "run", run)
    assert exhausted.advice(compose(TINY), 99) == "it would fit"
    exhausted.advice(compose([*TINY, "training.packing=true"]), 99)
    assert [request["config"]["training"]["max_length"] for request in asked] == [99, 256]


@pytest.mark.thorough
def test_another_process_plans_what_would_fit():
    assert exhausted.advice(compose([*TINY, "training.per_device_train_batch_size=64"])).startswith(
        "it should fit with"
    )
