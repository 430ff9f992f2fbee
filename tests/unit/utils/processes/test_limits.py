import os
import re
import signal
import time

import pytest

from qlora_exp.utils.processes.limits import FailedError, LimitedProcess, LimitError, call_limited


def fail():
    raise KeyError("first\nsecond")


def test_process_is_kept_and_errors_are_passed_on():
    process = LimitedProcess()
    try:
        first = process.call(os.getpid)
        with pytest.raises(FailedError, match=r"^'first\\nsecond'$"):
            process.call(fail)
        with pytest.raises(FailedError, match="pickle"):
            process.call(open, os.devnull)
        assert process.call(os.getpid) == first != os.getpid()
        # Beside the standard ones, the pipe and the descriptor that lists them: none of the parent's.
        assert len(set(process.call(os.listdir, "/proc/self/fd")) - {"0", "1", "2"}) == 2
    finally:
        process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.parametrize(
    ("function", "arguments", "why"),
    [
        (re.fullmatch, ("(a+)+b", "a" * 50), "more than 1 seconds"),
        (time.sleep, (9,), "more than 1 seconds"),
        (bytearray, (2**30,), "more than 64 MiB of memory"),
        (os.abort, (), "more than 64 MiB of memory"),
    ],
)
def test_exceeded_limit_ends_the_call_and_not_the_next_one(function, arguments, why):
    process = LimitedProcess(seconds=1, mib=64)
    with pytest.raises(LimitError, match=why):
        process.call(function, *arguments)
    assert process.call(len, "abc") == 3
    process.close()


def test_process_ends_with_its_parent():
    reader, writer = os.pipe()
    if not (parent := os.fork()):
        os.write(writer, str(LimitedProcess(seconds=60).call(os.getpid)).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int(os.read(reader, 20))
    until = time.monotonic() + 5
    while time.monotonic() < until and os.path.exists(f"/proc/{child}"):
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{child}")


def test_fork_of_the_parent_gets_a_process_of_its_own():
    process = LimitedProcess()
    first = process.call(os.getpid)
    reader, writer = os.pipe()
    if not (fork := os.fork()):
        os.write(writer, str(process.call(os.getpid)).encode())
        os._exit(0)
    os.waitpid(fork, 0)
    assert int(os.read(reader, 20)) != first == process.call(os.getpid)
    process.close()


def test_single_call_is_limited():
    assert call_limited(sum, [1, 2], seconds=5) == 3
    with pytest.raises(LimitError):
        call_limited(time.sleep, 9, seconds=1)
