"""Scores of answers to reasoning-gym's tasks, computed where an answer that is code can do no harm.

Several of its scorers run the answer: by `eval`, or by sympy's `parse_expr`, which does the same. Whoever made a model
chooses what it answers. So no answer is scored in this process, whatever the task. `python -m qlora_exp.scoring` is a
process with neither torch nor this one's environment. It builds the task and forks once for each answer. The fork gives
up all rights before it looks at the answer: the kernel lets it compute, take memory up to a limit, and write its score
into a pipe, and kills it for any other system call and after a time. It ends with its answer, so that no answer touches
another's score. All that code in an answer can still change is its own score.
"""

import ctypes
import importlib
import json
import logging
import os
import pkgutil
import platform
import signal
import struct
import subprocess
import sys
import warnings
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qlora_exp.utils.errors import DataError

log = logging.getLogger(__name__)

SECONDS = 10
"""For one answer; honest ones take milliseconds."""
_BYTES = 2 << 30
"""Of address space for one answer; reasoning-gym itself has 0.3 GiB."""
_PIPE = 3
"""The one file of a fork that it may write to something."""
_LATE = ("integrals", "physics.units", "polys", "sets.handlers", "simplify", "tensor.array")
"""Parts of sympy that it imports only for some answers, which a fork can not."""
_ALLOWED = {
    # Names of machines, their number in the kernel (AUDIT_ARCH), and their numbers of the same calls:
    # write, exit, exit_group, futex, clock_gettime, brk, munmap, mremap, mmap, mprotect, madvise, getrandom.
    "x86_64": (0xC000003E, (1, 60, 231, 202, 228, 12, 11, 25, 9, 10, 28, 318)),
    "aarch64": (0xC00000B7, (64, 93, 94, 98, 113, 214, 215, 216, 222, 226, 233, 278)),
}


def is_possible() -> bool:
    """Whether this machine can take rights away from a process as is needed here: Linux's seccomp."""
    return sys.platform == "linux" and platform.machine() in _ALLOWED


class Scorer:
    """A task's own score of an answer, `(answer, row) -> 0..1`; 0 with a warning if scoring it had to be stopped."""

    def __init__(self, task: str, settings: Mapping[str, Any]) -> None:
        """Start nothing yet: the process is there from the first answer on.

        Args:
            task: of reasoning-gym.
            settings: fields of the task's own config.
        """
        self.stopped = 0
        """Answers so far that could not be scored."""
        self._task, self._settings = task, dict(settings)
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, answer: str, row: Mapping[str, Any]) -> float:
        """The score of `answer` to this row.

        Raises:
            DataError: the process that scores does not start, or was killed from outside.
        """
        found = self._ask({"answer": answer, "entry": json.loads(row["entry"]), "seconds": SECONDS})
        if "score" in found:
            return float(found["score"])
        self.stopped += 1
        log.warning(
            "%s: scoring was stopped (%s): it counts 0, as %d answers so far do; the answer begins %.60r",
            self._task,
            found["stopped"],
            self.stopped,
            answer,
        )
        return 0.0

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # then there is no line to read either, which is said
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise DataError(f"reasoning_gym:{self._task}: the process that scores answers ended; its error is above")
        return json.loads(line)

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self._task, json.dumps(self._settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # One thread, because a fork has no others; hashes that do not differ from run to run.
            env={"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for whoever asks; this one ends with its input
        )
        weakref.finalize(self, process.communicate)
        return process


def score_alone(judge: Any, answer: str, entry: dict[str, Any], seconds: int) -> dict[str, Any]:
    """`{"score": 0..1}`, computed by a fork without rights, or `{"stopped": why}`."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            _give_up_rights(writer, seconds)
            os.write(_PIPE, repr(float(judge.score_answer(answer, entry))).encode())
            os._exit(0)
        except BaseException:  # also SystemExit: a fork never goes on in its parent's code; said as exit code 1
            os._exit(1)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(reader, "rb") as pipe:
        text = pipe.read(64)  # enough for a number, whatever was written
    if code:
        reasons = {-signal.SIGSYS: "it wanted more than to compute", -signal.SIGALRM: f"it took {seconds} seconds"}
        why = "the scorer raised an error" if code == 1 else f"signal {-code}"
        return {"stopped": reasons.get(code, why)}
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    return {"score": score} if 0 <= score <= 1 + 1e-9 else {"stopped": "the answer made it no number from 0 to 1"}


def _give_up_rights(writer: int, seconds: int) -> None:
    """For good: nothing that this process does later can undo it."""
    import resource

    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.dup2(writer, _PIPE)
    os.closerange(_PIPE + 1, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)  # signals can be neither blocked nor handled any more, nor another alarm be set
    _allow_only_to_compute()


def _allow_only_to_compute() -> None:
    """Install a seccomp filter: a little program that the kernel runs on each system call (see linux/seccomp.h)."""
    machine, calls = _ALLOWED[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # instructions: (code, skip if true, skip if false, value)
    kill, allow = 0x80000000, 0x7FFF0000
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(equal, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    steps += [(give, 0, 0, kill), (give, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter, nil = 38, 22, 2, ctypes.c_ulong(0)
    if libc.prctl(no_new_privileges, ctypes.c_ulong(1), nil, nil, nil) or libc.prctl(
        seccomp, ctypes.c_ulong(by_filter), header, nil, nil
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


class _Spy:
    """A task whose scorer asks the kernel for something harmless that it may not have."""

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(os.getppid() > 0)


def prepared(task: str, settings: Mapping[str, Any]) -> Any:
    """The task, with everything imported that its scorer may need: a fork cannot import what is not there yet."""
    import reasoning_gym

    judge = reasoning_gym.create_dataset(task, size=1, seed=0, **settings)
    for entry in judge:
        judge.score_answer(entry["answer"], entry)  # the task's own answer
    for part in _LATE:
        package = importlib.import_module(f"sympy.{part}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return judge


def _serve(task: str, settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some tasks print
    warnings.simplefilter("ignore")  # of what an answer looks like as code; showing one would read files
    if "more than to compute" not in str(score_alone(_Spy(), "", {}, SECONDS)):
        sys.exit("error: this system does not let a process give up its rights (seccomp)")
    judge = prepared(task, settings)
    for line in sys.stdin:
        print(json.dumps(score_alone(judge, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
