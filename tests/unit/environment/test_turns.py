import logging
import random
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import GradientState

from qlora_exp.environment import turns
from qlora_exp.environment.turns import Turns
from qlora_exp.utils.errors import TimeLimitError


@pytest.fixture
def take(tmp_path):
    """Let jobs take turns; their output goes to `NUMBER.log`."""
    return lambda *calls, **how: Turns(calls, [tmp_path / f"{number}.log" for number in range(len(calls))], **how)


def test_jobs_go_on_one_at_a_time_in_turn(take):
    seen, running = [], threading.Lock()

    def job(name: str, steps: int):
        def call() -> None:
            for step in range(steps):
                assert running.acquire(blocking=False)
                seen.append(f"{name}{step}")
                running.release()
                turns.pass_on()

        return call

    assert take(job("a", 1), job("b", 3), job("c", 2)).run() == [None, None, None]
    assert seen == ["a0", "b0", "c0", "b1", "c1", "b2"]


def test_as_a_job_ends_the_next_takes_its_place_and_gets_its_memory(take):
    seen: list[str] = []
    models: list[weakref.ref[Any]] = []

    class Model:
        pass

    def job(name: str, steps: int, fails: bool = False):
        def call() -> None:
            model = Model()
            model.itself = model  # as models do, so that only a collection frees it
            models.append(weakref.ref(model))
            for step in range(steps):
                seen.append(f"{name}{step}")
                turns.pass_on()
            if fails:
                raise ValueError(name)

        return call

    jobs = take(job("a", 3), job("b", 1, fails=True), job("c", 1), job("d", 2), at_once=2)
    assert [str(error) for error in jobs.run()] == ["None", "b", "None", "None"]
    assert seen == ["a0", "b0", "a1", "a2", "c0", "d0", "d1"]
    assert [model() is None for model in models[:2]] == [True, True]
    assert jobs.running == ()


def test_after_an_interrupt_no_job_begins(take, tmp_path):
    def interrupt() -> None:
        turns.pass_on()
        raise KeyboardInterrupt

    errors = take(interrupt, turns.pass_on, turns.pass_on, at_once=2).run()
    assert [type(error) for error in errors] == [KeyboardInterrupt, KeyboardInterrupt, type(None)]
    assert not (tmp_path / "2.log").exists()


def test_each_job_draws_the_numbers_that_it_would_draw_alone(take):
    def draw(seed: int, into: list[float]):
        def call() -> None:
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            for _ in range(3):
                into.extend([random.random(), np.random.rand(), torch.rand(1).item()])
                turns.pass_on()

        return call

    together: list[list[float]] = [[], [], []]
    before = torch.get_rng_state()
    take(*(draw(seed, into) for seed, into in enumerate(together))).run()
    assert torch.equal(torch.get_rng_state(), before)
    for seed, drawn in enumerate(together):
        alone: list[float] = []
        draw(seed, alone)()
        assert drawn == alone


def test_output_logs_and_states_of_libraries_are_each_jobs_own(take, tmp_path):
    def job(name: str):
        def call() -> None:
            handler = logging.FileHandler(tmp_path / f"{name}.txt")
            logging.getLogger().handlers[:] = [handler]
            GradientState._shared_state["name"] = name
            precision = {"a": "medium", "b": "highest"}[name]
            torch.set_float32_matmul_precision(precision)
            for step in range(2):
                print(f"{name} {step}")
                logging.getLogger().error("%s %d", name, step)
                turns.pass_on()
                assert GradientState._shared_state["name"] == name
                assert torch.get_float32_matmul_precision() == precision
            handler.close()

        return call

    handlers, precision = logging.getLogger().handlers[:], torch.get_float32_matmul_precision()
    assert take(job("a"), job("b")).run() == [None, None]
    assert torch.get_float32_matmul_precision() == precision
    assert logging.getLogger().handlers == handlers
    assert "name" not in GradientState._shared_state
    for number, name in enumerate("ab"):
        assert (tmp_path / f"{number}.log").read_text() == f"{name} 0\n{name} 1\n"
        assert (tmp_path / f"{name}.txt").read_text() == f"{name} 0\n{name} 1\n"


def test_an_error_ends_its_job_only(take):
    def fail() -> None:
        turns.pass_on()
        raise ValueError("mine")

    ended = []

    def work() -> None:
        for _ in range(4):
            turns.pass_on()
        ended.append(turns.number())

    errors = take(work, fail, work).run()
    assert [str(error) for error in errors] == ["None", "mine", "None"]
    assert ended == [0, 2]


def test_an_interrupt_reaches_every_job(take):
    started, cleaned = threading.Event(), []

    def work() -> None:
        try:
            while True:
                started.set()
                turns.pass_on()
        finally:
            cleaned.append(turns.number())

    def interrupt() -> None:
        turns.pass_on()
        raise KeyboardInterrupt

    errors = take(work, interrupt, work).run()
    assert [type(error) for error in errors] == [KeyboardInterrupt] * 3
    assert sorted(cleaned) == [0, 2]


def test_the_clock_stands_in_the_turns_of_others(take):
    measured: dict[int, float] = {}

    def job(seconds: float):
        def call() -> None:
            begin = turns.seconds()
            for _ in range(2):
                time.sleep(seconds)
                turns.pass_on()
            measured[turns.number()] = turns.seconds() - begin

        return call

    take(job(0.0), job(0.1)).run()
    assert measured[0] < 0.1 < 0.2 <= measured[1]


def test_time_that_one_job_takes_for_all_is_shared(take):
    measured: dict[int, float] = {}

    def job(works: bool):
        def call() -> None:
            begin = turns.seconds()
            if works:
                time.sleep(0.2)
                turns.current().share(0.2, {0: 0.75, 1: 0.25})
            turns.pass_on()
            measured[turns.number()] = turns.seconds() - begin

        return call

    take(job(works=False), job(works=True)).run()
    assert measured[0] == pytest.approx(0.15, abs=0.04)
    assert measured[1] == pytest.approx(0.05, abs=0.04)


def test_a_time_limit_ends_a_job_by_the_time_of_its_own_turns(take, tmp_path):
    def job(seconds: float):
        def call() -> None:
            with turns.time_limit(0.15, tmp_path / f"note{turns.number()}"):
                for _ in range(4):
                    time.sleep(seconds)
                    turns.pass_on()

        return call

    slow, fast = take(job(0.06), job(0.01)).run()
    assert isinstance(slow, TimeLimitError)
    assert fast is None
    assert (tmp_path / "note0").exists()
    assert not (tmp_path / "note1").exists()


def test_what_is_shared_is_made_once(take):
    made = []

    def job() -> None:
        assert turns.current().keep("base", lambda: made.append(1) or "base") == "base"

    assert take(job, job).run() == [None, None]
    assert made == [1]


def test_outside_of_turns_nothing_happens():
    turns.pass_on()
    assert turns.current() is None
    assert turns.seconds() == pytest.approx(time.perf_counter(), abs=0.1)


def test_a_free_place_is_filled_with_what_is_asked_for_then(take, tmp_path, capsys):
    seen: list[str] = []

    def job(name: str, steps: int):
        def call() -> None:
            for step in range(steps):
                seen.append(f"{name}{step}")
                print(name)
                turns.pass_on()

        return call

    further = [[], [(job("c", 1), tmp_path / "c.log"), (job("d", 1), tmp_path / "d.log")], []]

    def more():
        print("asked")
        return further.pop(0) if further else []

    jobs = take(job("a", 1), job("b", 2), at_once=2, more=more)
    assert jobs.run() == [None] * 4
    assert seen == ["a0", "b0", "b1", "c0", "d0"]  # nothing takes a's place, so two take that of b and a
    assert (tmp_path / "c.log").read_text() == "c\n"
    assert {*capsys.readouterr().out.split()} == {"asked"}
    assert jobs.running == ()


def test_if_asking_fails_the_other_jobs_go_on_and_it_is_said(take):
    def more():
        raise ValueError("no answer")

    done: list[int] = []
    jobs = take(lambda: None, lambda: (turns.pass_on(), done.append(1)), more=more)
    assert [str(error) for error in jobs.run()] == ["no answer", "no answer"]
    assert done == [1]


def test_what_is_asked_for_during_an_interrupt_does_not_begin(take, tmp_path):
    def interrupt() -> None:
        turns.pass_on()
        raise KeyboardInterrupt

    begun: list[int] = []

    def more():
        jobs._interrupt(KeyboardInterrupt())
        return [(lambda: begun.append(1), tmp_path / "more.log")]

    jobs = take(lambda: None, turns.pass_on, at_once=2, more=more)
    errors = jobs.run()
    assert begun == []
    assert isinstance(errors[1], KeyboardInterrupt)
