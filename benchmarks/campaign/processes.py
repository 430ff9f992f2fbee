"""Run commands in processes that are forked from one with the libraries loaded, and kill them at a chosen moment."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 240.0
"""Longest time of a command; one that takes longer is stuck."""
_PRELOAD = [
    "qlora_exp.recipe.preload", "qlora_exp.cli.main", "qlora_exp.tracking.sync",
    "qlora_exp.results.reproduce", "qlora_exp.results.bundle", "qlora_exp.results.report", "qlora_exp.results.plots",
    "qlora_exp.deploy.export", "qlora_exp.deploy.registry", "qlora_exp.libraries.hydra",
]  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "sqlite3.connect", "socket.connect"}


@dataclass(frozen=True)
class Kill:
    """A moment to kill (-9) a command at: after some seconds, or just before one of its file operations."""

    seconds: float | None = None
    operation: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Exit status; negative: the signal; None: it did not end in time and was killed."""
    output: str
    seconds: float
    operations: int
    """Number of its file operations; 0 if it was killed."""

    @property
    def problem(self) -> str:
        """What no command may do, whatever happened before: take too long, or show a traceback."""
        if self.code is None:
            return f"stuck: still running after {LIMIT_SECONDS:g} s"
        if "Traceback (most recent call last)" in self.output:
            return f"traceback: {self.output.strip().splitlines()[-1][:300]}"
        if self.code not in (0, 1, -signal.SIGKILL):
            return f"exit status {self.code}: {self.last_line}"
        if self.code == 1 and not self.last_line:
            return "exit status 1 without a line"
        return ""

    @property
    def last_line(self) -> str:
        """The last line that it printed."""
        return next(iter(self.output.strip().splitlines()[::-1]), "")[:400]


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()
    return context


def run(words: Sequence[str], folder: Path, kill: Kill | None = None) -> Ended:
    """Run a command in a folder, and wait for its end; with `kill`, kill it at that moment."""
    printed, counted = folder.with_name(f"{folder.name}.output"), folder.with_name(f"{folder.name}.operations")
    counted.unlink(missing_ok=True)
    begin = time.monotonic()
    arguments = (list(words), folder, printed, counted, kill and kill.operation, dict(os.environ))
    process = _context().Process(target=_command, args=arguments)
    process.start()
    process.join(kill.seconds if kill and kill.seconds is not None else LIMIT_SECONDS)
    stuck = False
    if process.exitcode is None:
        stuck = kill is None or kill.seconds is None
        process.kill()
        process.join()
    seconds = time.monotonic() - begin
    operations = int(counted.read_text()) if counted.is_file() else 0
    code = None if stuck else process.exitcode
    return Ended(code, printed.read_text("utf-8", "replace"), seconds, operations)


def _command(
    words: list[str], folder: Path, printed: Path, counted: Path, last: int | None, environment: dict[str, str]
) -> None:
    """Run the command line; runs in the forked process."""
    from qlora_exp.cli.main import main

    gc.freeze()  # what was imported before is no garbage, and looking at it would copy its memory
    gc.enable()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITES):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        main(words)
    finally:
        total = count
        counted.write_text(str(total))
