"""Score answers to reasoning-gym's tasks in a sandbox, where an answer that is code can do no harm.

Several of reasoning-gym's scorers execute the answer: with `eval`, or with sympy's `parse_expr`, which does the same.
The author of a model decides what it answers. So no answer is scored in the main process, whatever the task. The
scoring process, `python -m qlora_exp.data.scoring`, has neither torch nor the main process's environment variables. It
builds the task and forks once for each answer. The fork gives up all rights before it reads the answer: the kernel lets
it compute, allocate memory up to a limit, and write its score into a pipe. The kernel kills it for any other system
call, and after a time limit. Each fork scores one answer, so that no answer can change the score of another. Code in an
answer can only change its own score.
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

SECONDS = 10.0
"""Time limit for one answer; ordinary answers take milliseconds."""
_BYTES = 2 << 30
"""Limit of address space for one answer; reasoning-gym itself takes 0.3 GiB."""
_PIPE = 3
"""File descriptor of the pipe for the score: the only one of a fork that leads anywhere."""
_LATE = ("assumptions", "integrals", "physics.units", "polys", "sets.handlers", "simplify", "tensor.array")
"""Parts of sympy that sympy imports only for some answers. A fork cannot import, so they are imported before."""
_FORBIDDEN = "the answer made a system call that is not allowed"
_ALLOWED = {
    # Machine name: (number of the machine in the kernel (AUDIT_ARCH), numbers of the system calls that are allowed).
    # The calls are the same for each machine:
    # write, exit, exit_group, futex, clock_gettime, brk, munmap, mremap, mmap, mprotect, madvise, getrandom.
    "x86_64": (0xC000003E, (1, 60, 231, 202, 228, 12, 11, 25, 9, 10, 28, 318)),
    "aarch64": (0xC00000B7, (64, 93, 94, 98, 113, 214, 215, 216, 222, 226, 233, 278)),
}


def is_possible() -> bool:
    """Return whether this machine has the sandbox: Linux's seccomp, on a processor listed here."""
    return sys.platform == "linux" and platform.machine() in _ALLOWED


class Scorer:
    """The scorer of a reasoning-gym task, `(answer, row) -> 0..1`; 0 with a warning if scoring had to be stopped."""

    def __init__(self, task: str, settings: Mapping[str, Any]) -> None:
        """Keep the settings; the scoring process starts with the first answer.

        Args:
            task: name of a reasoning-gym task.
            settings: fields of the task's own config.
        """
        self.stopped = 0
        """Number of answers so far that could not be scored."""
        self._task, self._settings = task, dict(settings)
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, answer: str, row: Mapping[str, Any]) -> float:
        """Return the score of `answer` to this row.

        Raises:
            DataError: the scoring process does not start, or was killed from outside.
        """
        reply = self._ask({"answer": answer, "entry": json.loads(row["entry"]), "seconds": SECONDS})
        if "score" in reply:
            return float(reply["score"])
        self.stopped += 1
        log.warning(
            "%s: scoring was stopped (%s), so the answer counts 0 (%d answers so far); the answer begins with %.60r",
            self._task,
            reply["stopped"],
            self.stopped,
            answer,
        )
        return 0.0

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # then there is no line to read either, which raises below
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise DataError(f"reasoning_gym:{self._task}: the scoring process ended; its error is above")
        return json.loads(line)

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self._task, json.dumps(self._settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # One thread, because a fork keeps only the thread that forks; hashes that are the same in each run.
            env={"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C goes to the main process only; this one ends when its input does
        )
        weakref.finalize(self, process.communicate)
        return process


def score_in_fork(judge: Any, answer: str, entry: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Score one answer in a fork without rights.

    Returns:
        `{"score": 0..1}`, or `{"stopped": why}`.
    """
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            _give_up_rights(writer, seconds)
            os.write(_PIPE, repr(float(judge.score_answer(answer, entry))).encode())
            os._exit(0)
        except BaseException:  # also SystemExit: a fork must never continue in its parent's code
            os._exit(1)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(reader, "rb") as pipe:
        text = pipe.read(64)  # enough for a number, whatever was written
    if code:
        reasons = {-signal.SIGSYS: _FORBIDDEN, -signal.SIGALRM: f"it took {seconds:g} seconds"}
        why = "the scorer raised an error" if code == 1 else f"signal {-code}"
        return {"stopped": reasons.get(code, why)}
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    return {"score": score} if 0 <= score <= 1 + 1e-9 else {"stopped": "the score is not a number from 0 to 1"}


def _give_up_rights(writer: int, seconds: float) -> None:
    """Give up all rights of this process for ever: nothing that it does later can undo this."""
    import resource

    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.dup2(writer, _PIPE)
    os.closerange(_PIPE + 1, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)  # later, signals can be neither blocked nor handled, no timer set
    _allow_only_to_compute()


def _allow_only_to_compute() -> None:
    """Install a seccomp filter: a small program that the kernel runs on each system call (see linux/seccomp.h)."""
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
    """A task whose scorer makes a harmless system call that is not allowed, to test the sandbox."""

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(os.getppid() > 0)


def prepared(task: str, settings: Mapping[str, Any]) -> Any:
    """Create the task, and import everything that its scorer may need: a fork cannot import."""
    import reasoning_gym

    judge = reasoning_gym.create_dataset(task, size=1, seed=0, **settings)
    for entry in judge:
        judge.score_answer(entry["answer"], entry)  # imports what scoring the task's own answer needs
    for part in _LATE:
        package = importlib.import_module(f"sympy.{part}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("_doc"):  # they compute tables for sympy's documentation, for seconds
                importlib.import_module(module.name)
    return judge


def _serve(task: str, settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some tasks print
    warnings.simplefilter("ignore")  # about the code in an answer; printing a warning would read files
    if _FORBIDDEN not in str(score_in_fork(_Spy(), "", {}, SECONDS)):
        sys.exit("error: answers cannot be scored safely: seccomp, which restricts a process, does not work here")
    judge = prepared(task, settings)
    for line in sys.stdin:
        print(json.dumps(score_in_fork(judge, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
