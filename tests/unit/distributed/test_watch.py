"""When a process of a run fails, dies, freezes or hangs, the others learn which one and why."""

import os
import threading
import time

import pytest

from qlora_exp.distributed import watch
from qlora_exp.environment.ranks import Ranks
from qlora_exp.utils.errors import ConfigError, RankError

CLOSED = RuntimeError("Read error [127.0.0.1]:5: Connection closed by peer")


class Store:
    """A store like torch's, in this process."""

    def __init__(self, values: dict[str, bytes]) -> None:
        self.values = values

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture
def join(monkeypatch):
    """Let this process watch as one of several ranks; all share a store."""
    values: dict[str, bytes] = {}
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: Store(values))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(watch, "_PATIENCE", 0.3)
    monkeypatch.setattr(watch, "_PERIOD", 0.05)
    opened = []

    def start(rank: int, size: int = 2, timeout: float = 60) -> watch._Watch:
        opened.append(watch._Watch(Ranks(rank, rank, size, size), timeout))
        return opened[-1]

    yield start
    for each in opened:
        each.leave()


def cause(mine: watch._Watch, error: BaseException, monkeypatch) -> RankError | None:
    monkeypatch.setattr(watch, "_current", mine)
    return watch.cause(error)


def test_error_of_another_process_is_the_cause_of_a_lost_connection(join, monkeypatch):
    mine, other = join(0), join(1)
    other.report(ValueError("boom"))
    found = cause(mine, CLOSED, monkeypatch)
    assert (found.rank, found.outcome, str(found)) == (1, "error", "rank 1: ValueError: boom")
    assert "ValueError: boom" in found.report


def test_memory_that_ran_out_elsewhere_is_the_outcome(join, monkeypatch):
    mine, other = join(0), join(1)
    other.report(RuntimeError("CUDA out of memory"))
    assert cause(mine, KeyboardInterrupt(), monkeypatch).outcome == "oom"


@pytest.mark.parametrize("error", [ConfigError("mine"), RuntimeError("out of memory"), ValueError("mine")])
def test_error_that_no_other_process_can_cause_is_its_own(error, join, monkeypatch):
    mine, other = join(0), join(1)
    other.report(ValueError("boom"))
    assert cause(mine, error, monkeypatch) is None


def test_process_that_lost_another_is_not_the_cause(join, monkeypatch):
    mine, other, third = join(0, 3), join(1, 3), join(2, 3)
    other.report(CLOSED)
    third.report(ValueError("boom"))
    assert cause(mine, CLOSED, monkeypatch).rank == 2


def test_process_without_a_word_is_the_cause_of_a_timeout(join, monkeypatch):
    mine, other, _third = join(0, 3), join(1, 3), join(2, 3)
    timeout = RuntimeError("Timed out waiting 20000ms for recv operation to complete")
    other.report(timeout)
    found = cause(mine, timeout, monkeypatch)
    assert found.rank == 2
    assert "did not do its part in time" in str(found)


def test_interrupt_of_all_is_an_interrupt(join, monkeypatch):
    mine, other = join(0), join(1)
    other.report(KeyboardInterrupt())
    begin = time.monotonic()
    assert cause(mine, KeyboardInterrupt(), monkeypatch) is None
    assert time.monotonic() - begin < 0.2


def test_interrupt_of_one_ends_the_run_as_killed(join, monkeypatch):
    mine, other = join(0), join(1)
    other.report(KeyboardInterrupt())
    assert cause(mine, CLOSED, monkeypatch).outcome == "killed"


def test_dead_process_is_named(join, monkeypatch):
    mine, _other = join(0), join(1)
    monkeypatch.setattr("qlora_exp.environment.provenance.is_dead", lambda _: True)
    assert str(mine.look()).startswith(f"rank 1: its process {os.getpid()} on ")


def test_process_that_has_left_is_not_dead(join, monkeypatch):
    mine, other = join(0), join(1)
    other.leave()
    monkeypatch.setattr("qlora_exp.environment.provenance.is_dead", lambda _: True)
    assert mine.look() is None


def test_frozen_process_is_killed_for_a_reason_that_outlives_this_process(join, monkeypatch, tmp_path):
    killed = []
    monkeypatch.setattr(watch, "reasons", tmp_path)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    mine, other = join(0, timeout=0.2), join(1)
    other.ended.set()  # no more signs of life
    deadline = time.monotonic() + 5
    while mine.failure is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "gave no sign of life for 0 s" in str(mine.failure)
    assert killed == [(os.getpid(), 9)]
    assert "gave no sign of life for 0 s" in (tmp_path / "1.silent").read_text()


def test_process_that_cannot_end_by_itself_records_the_failure_and_is_ended(join, monkeypatch):
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.1)
    ended, recorded = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: ended.set() if code == 1 else None)
    mine, other = join(0), join(1)
    mine.at_failure = recorded.append
    other.report(ValueError("boom"))
    assert ended.wait(5)
    assert str(recorded[0]) == "rank 1: ValueError: boom"


def test_process_whose_launcher_was_killed_ends_as_killed(join, monkeypatch):
    mine = join(0)

    def gone(*_):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(mine._store, "set", gone)
    deadline = time.monotonic() + 5
    while mine.failure is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (mine.failure.rank, mine.failure.outcome) == (0, "killed")


def test_network_error_of_a_library_loses_no_process(join, monkeypatch):
    mine, other = join(0), join(1)
    other.report(TimeoutError("the read operation timed out"))
    assert cause(mine, CLOSED, monkeypatch).why == "TimeoutError: the read operation timed out"


def test_single_process_watches_nobody():
    with watch.watching(Ranks(), 1.0):
        watch.at_failure(pytest.fail)
        assert watch.cause(CLOSED) is None
