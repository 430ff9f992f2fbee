import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from qlora_exp.utils.errors import TimeLimitError
from qlora_exp.utils.processes import signals
from qlora_exp.utils.processes.signals import OUT_OF_TIME, defer_signals, handle_signals, time_limit


def test_time_limit_raises_through_handlers_of_exceptions(tmp_path):
    begin = time.monotonic()
    with pytest.raises(TimeLimitError), handle_signals(), time_limit(0.2, tmp_path / "late"):
        try:
            time.sleep(20)
        except Exception:
            pytest.fail("a handler of whatever may go wrong swallows it")
    assert time.monotonic() - begin < 10
    assert (tmp_path / "late").exists()


@pytest.mark.parametrize("seconds", [None, 0.1])
def test_time_limit_not_reached_has_no_later_effect(seconds: float | None, tmp_path):
    (tmp_path / "late").touch()  # of an earlier attempt
    with handle_signals():
        with time_limit(seconds, tmp_path / "late"):
            pass
        time.sleep(0.2)
    assert not (tmp_path / "late").exists()


@pytest.mark.slow
def test_process_that_ignores_the_time_limit_is_killed_with_traceback():
    deaf = """
import signal, time, pathlib
from qlora_exp.utils.processes import signals
signals.GRACE_SECONDS = 0.3
signal.signal(signals.OUT_OF_TIME, signal.SIG_IGN)
with signals.time_limit(0.3, pathlib.Path("late")):
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", deaf], capture_output=True, text=True, check=False, timeout=30)
    assert pathlib.Path("late").exists()
    assert result.returncode == 1
    assert 'File "<string>", line 7' in result.stderr


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, KeyboardInterrupt), (signal.SIGINT, KeyboardInterrupt), (OUT_OF_TIME, TimeLimitError)],
)
def test_signal_inside_critical_section_is_raised_after_it(number, error):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []
    with pytest.raises(error), handle_signals():
        with defer_signals(), defer_signals():
            os.kill(os.getpid(), number)
            done.append("inside")
        done.append("after")
    assert done == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_second_signal_interrupts_a_critical_section():
    done = []
    with pytest.raises(KeyboardInterrupt), handle_signals(), defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("once")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("twice")
    assert done == ["once"]
    with handle_signals(), defer_signals():
        pass  # nothing is left over


def test_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handle_signals():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_ends_the_process_waits_only_where_a_checkpoint_can_be_saved():
    called: list[str] = []
    signals.end(lambda: called.append("at once"))
    with signals.checkpoint_first():
        signals.end(lambda: called.append("later"))
        assert (called, signals.is_ending()) == (["at once"], True)
        signals.end(lambda: called.append("a second time"))  # whoever asks twice does not wait
        called.append("checkpoint")
    assert called == ["at once", "a second time", "checkpoint", "later"]
    assert not signals.is_ending()
    with pytest.raises(ValueError, match="its own"), signals.checkpoint_first():
        signals.end(lambda: called.append("never"))
        raise ValueError("its own")
    assert "never" not in called
    assert not signals.is_ending()
