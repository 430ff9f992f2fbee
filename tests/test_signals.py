import pathlib
import subprocess
import sys
import time

import pytest

from qlora_exp.errors import TimeLimitError
from qlora_exp.signals import heeded, time_limit


def test_who_is_out_of_time_can_still_write_it_down(tmp_path):
    begin = time.monotonic()
    with pytest.raises(TimeLimitError), heeded(), time_limit(0.2, tmp_path / "late"):
        try:
            time.sleep(20)
        except Exception:
            pytest.fail("a handler of whatever may go wrong swallows it")
    assert time.monotonic() - begin < 10
    assert (tmp_path / "late").exists()


@pytest.mark.parametrize("seconds", [None, 0.3])
def test_who_is_in_time_notices_nothing_even_later(seconds: float | None, tmp_path):
    (tmp_path / "late").touch()  # of an earlier attempt
    with heeded():
        with time_limit(seconds, tmp_path / "late"):
            pass
        time.sleep(0.6)
    assert not (tmp_path / "late").exists()


def test_who_does_not_listen_is_ended_with_the_place_where_it_hangs():
    deaf = """
import signal, time, pathlib
from qlora_exp import signals
signals.GRACE_SECONDS = 0.3
signal.signal(signals.OUT_OF_TIME, signal.SIG_IGN)
with signals.time_limit(0.3, pathlib.Path("late")):
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", deaf], capture_output=True, text=True, check=False, timeout=30)
    assert pathlib.Path("late").exists()
    assert result.returncode == 1
    assert 'File "<string>", line 7' in result.stderr
