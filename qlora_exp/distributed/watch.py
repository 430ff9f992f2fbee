"""Watch the other processes of a run: when one fails, dies or hangs, the run ends as a whole, with that one's reason.

Every process says through torch's store that it is alive, and why it failed. A thread looks at the others, because
the main thread may wait in a collective operation that never ends; such a wait cannot be interrupted.
"""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_exp.environment import provenance
from qlora_exp.environment.ranks import Ranks
from qlora_exp.utils.errors import RankError, is_out_of_memory, type_and_first_line

log = logging.getLogger(__name__)

_PERIOD = 0.5
"""Seconds between two looks at the others."""
SILENT_SECONDS = 60.0
"""Seconds without a sign of life after which a process is taken to be frozen, and killed; at most `ddp_timeout`."""
_PATIENCE = 5.0
"""Seconds to wait for another process's reason, after an error that may come from its end."""
GRACE_SECONDS = 15.0
"""Seconds that a process gets to end by itself after another one has failed."""
_LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|socket|timed? ?out", re.IGNORECASE)
"""What torch's errors say when another process ended or hangs; libraries that use the network have other types."""


reasons: Path | None = None
"""Folder for a file `RANK.silent` with why this process killed another one. The parent reads it: this one may be ended
before it can say so."""


class _Watch:
    """This process's view of the others."""

    def __init__(self, place: Ranks, timeout: float) -> None:
        from torch.distributed import TCPStore

        # A connection of its own: the main thread's may wait for a key.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(address, port, is_master=False, wait_for_workers=False)
        self._place = place
        self._silent_seconds = min(SILENT_SECONDS, timeout)
        self.others = [rank for rank in range(place.size) if rank != place.rank]
        self._beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        """Last sign of life of each other process, and when it was new."""
        self._processes: dict[int, dict[str, str]] = {}
        self._frozen: dict[int, str] = {}
        """Processes that were killed because they gave no sign of life, with that as their reason."""
        self.failure: RankError | None = None
        """The failure of another process that was noticed first."""
        self.ended, self.ending = threading.Event(), threading.Event()
        """Set when the watch ends; and when the main thread ends the run, which may take longer than its grace."""
        self.at_failure: Callable[[RankError], None] = lambda _: None
        self._set("process", json.dumps(provenance.process()))
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def _set(self, what: str, value: str) -> None:
        self._store.set(f"qlora_exp/{self._place.rank}/{what}", value)

    def _get(self, rank: int, what: str) -> bytes | None:
        key = f"qlora_exp/{rank}/{what}"
        return self._store.get(key) if self._store.check([key]) else None

    def _beat(self) -> None:
        self._beats += 1
        self._set("alive", str(self._beats))

    def report(self, error: BaseException) -> None:
        """Say to the others that this process has failed, and why."""
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        outcome = "killed" if interrupted else "oom" if is_out_of_memory(error) else "error"
        text = "" if interrupted else "".join(traceback.format_exception(error))[-20_000:]
        said = {"outcome": outcome, "why": type_and_first_line(error), "lost": _lost_another(error), "traceback": text}
        with suppress(RuntimeError):  # the process with the store has ended
            self._set("failure", json.dumps(said | {"at": time.time()}))

    def look(self) -> RankError | None:
        """Return the earliest failure of another process, but none that followed from another one; None without one."""
        failures: list[tuple[float, RankError]] = []
        for rank in self.others:
            if (said := self._get(rank, "failure")) is not None:
                report = json.loads(said)
                if report["outcome"] != "killed" and not report["lost"]:
                    error = RankError(rank, report["why"], report["outcome"], report["traceback"])
                    failures.append((report["at"], error))
            elif (why := self._gone(rank)) and self._get(rank, "left") is None:
                failures.append((0.0, RankError(rank, why, "error")))
        return min(failures, key=lambda failure: failure[0])[1] if failures else None

    def _gone(self, rank: int) -> str:
        """Return how a process died or froze without a word; empty if it lives."""
        if rank not in self._processes:
            if (recorded := self._get(rank, "process")) is None:
                return ""
            self._processes[rank] = json.loads(recorded)
        process = self._processes[rank]
        if rank in self._frozen:
            return self._frozen[rank]
        if provenance.is_dead(process):
            return (
                f"its process {process['pid']} on {process['host']} ended without a message: it was killed, perhaps "
                "by the kernel because memory ran out"
            )
        beat, now = self._get(rank, "alive") or b"", time.monotonic()
        if self._seen.get(rank, (b"", 0.0))[0] != beat:
            self._seen[rank] = (beat, now)
        elif now - self._seen[rank][1] > self._silent_seconds:
            where = f"its process {process['pid']} on {process['host']}"
            self._frozen[rank] = f"{where} gave no sign of life for {self._silent_seconds:.0f} s"
            if provenance.is_of_this_boot(process):  # or it would stay for ever, with what it holds
                if reasons is not None:
                    (reasons / f"{rank}.silent").write_text(self._frozen[rank], "utf-8")
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(process["pid"]), signal.SIGKILL)
            return self._frozen[rank]
        return ""

    def without_report(self) -> list[int]:
        """List the other processes that have not said that they failed."""
        return [rank for rank in self.others if self._get(rank, "failure") is None]

    def interrupted(self) -> list[int]:
        """List the other processes that have said that they were interrupted."""
        reports = {rank: self._get(rank, "failure") for rank in self.others}
        return [rank for rank, report in reports.items() if report and json.loads(report)["outcome"] == "killed"]

    def leave(self) -> None:
        """End the watch: this process has done its work."""
        self.ended.set()
        self.ending.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._set("left", "")

    def _run(self) -> None:
        while self.failure is None and not self.ended.wait(_PERIOD):
            try:
                self._beat()
                self.failure = self.look()
            except RuntimeError as error:  # the process with the store has ended
                why = f"it lost the process that holds torch's store: {type_and_first_line(error)}"
                self.failure = RankError(self._place.rank, why, "killed")
        if self.failure is None:
            return
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        where = "".join(traceback.format_stack(main)[-8:])
        log.info("another process failed (%s); this one is here:\n%s", self.failure, where)
        if not self.ending.wait(GRACE_SECONDS):
            # The main thread waits in an operation that nothing but the end of the process interrupts.
            with suppress(Exception):
                self.at_failure(self.failure)
            os._exit(1)


def _lost_another(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


_current: _Watch | None = None


@contextmanager
def watching(place: Ranks, timeout: float) -> Iterator[None]:
    """Watch the other processes inside the `with` block; report an exception to them.

    Args:
        place: place of this process.
        timeout: seconds that a process waits for the others.
    """
    global _current
    if place.size == 1:
        yield
        return
    watch = _current = _Watch(place, timeout)
    try:
        yield
    except BaseException as error:  # an interrupt too: the others must not wait for this process
        watch.report(error)
        raise
    finally:
        _current = None
        watch.leave()


def cause(error: BaseException) -> RankError | None:
    """Return the failure of another process that is behind an error here; None if this process failed by itself.

    After an error that the end of another process can cause, it waits a few seconds for that one's reason.
    """
    if _current is None:
        return None
    _current.ending.set()
    if isinstance(error, RankError):
        return None
    can_follow = isinstance(error, RuntimeError | KeyboardInterrupt) and not is_out_of_memory(error)
    if not can_follow:
        return None
    lost, deadline = _lost_another(error), time.monotonic() + _PATIENCE
    with suppress(RuntimeError):  # the process with the store has ended: the watch knows
        while True:
            if (failure := _current.look()) is not None:
                return failure
            interrupted = _current.interrupted()
            if lost and interrupted:
                return RankError(interrupted[0], "it was interrupted", "killed")
            if time.monotonic() >= deadline or len(interrupted) == len(_current.others):
                break
            time.sleep(_PERIOD / 5)
        if lost and (silent := _current.without_report()):
            why = f"did not do its part in time, and the others lost it ({type_and_first_line(error)}); see its log"
            return RankError(silent[0], why, "error")
    return _current.failure


def at_failure(call: Callable[[RankError], None]) -> None:
    """Set what happens when another process has failed and this one cannot end by itself; then it is ended."""
    if _current is not None:
        _current.at_failure = call
