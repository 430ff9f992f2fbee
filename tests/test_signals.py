import subprocess
import sys
import time

import pytest

from qlora_exp.errors import TimeLimitError
from qlora_exp.signals import heeded, time_limit


def test_who_is_out_of_time_can_still_write_it_down():
    begin = time.monotonic()
    with pytest.raises(TimeLimitError), heeded(), time_limit(0.2):
        time.sleep(20)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_who_is_in_time_notices_nothing(seconds: float | None):
    with heeded(), time_limit(seconds):
        done = True
    assert done


def test_who_does_not_listen_is_ended_with_the_place_where_it_hangs():
    deaf = """
import signal, time
from qlora_exp import signals
signals.GRACE_SECONDS = 0.3
signal.signal(signals.OUT_OF_TIME, signal.SIG_IGN)
with signals.time_limit(0.3):
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", deaf], capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 1
    assert 'File "<string>", line 7' in result.stderr
