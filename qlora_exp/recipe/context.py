"""Define what the stages of a run share: its config and device, its folder, its tracker, memory and metrics."""

import gc
import logging
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlora_exp.config.schema import Config
from qlora_exp.distributed import group, watch
from qlora_exp.environment import provenance, turns
from qlora_exp.environment.device import Resolved
from qlora_exp.environment.memory import MemoryMonitor, reuse_freed_memory
from qlora_exp.environment.products import fast_products
from qlora_exp.environment.ranks import ranks
from qlora_exp.libraries.torch import fp32_precision_kept
from qlora_exp.planning import calibration
from qlora_exp.recipe import summary
from qlora_exp.recipe.launch import RANKS_FOLDER
from qlora_exp.recipe.result import RunResult
from qlora_exp.tracking import lifecycle
from qlora_exp.tracking.journal import FILE as JOURNAL_FILE
from qlora_exp.tracking.muted import MutedTracker
from qlora_exp.tracking.tracker import LOG_FILE, Tracker
from qlora_exp.utils.display import RedactingFormatter
from qlora_exp.utils.errors import ConfigError, RankError, UserError
from qlora_exp.utils.processes.signals import handle_signals, ignore_signals
from qlora_exp.utils.quiet import hide_bars

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """A run in progress, passed from stage to stage."""

    config: Config
    resolved: Resolved
    output_dir: Path
    tracker: Tracker
    memory: MemoryMonitor
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of each metric that is measured once in a run."""
    began: float = field(default_factory=time.monotonic)
    """When the run began, in seconds."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.output_dir / "checkpoints"

    @property
    def first_adapter(self) -> Path:
        """Folder with the initial adapter; it exists while the run needs it to save the difference from it."""
        return self.output_dir / "first_adapter"

    @property
    def saved_model(self) -> Path:
        """Folder of the trained adapter or model."""
        return self.output_dir / "model"

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Log metrics that are measured once in a run, and keep them in `metrics`."""
        self.metrics.update(values)
        self.tracker.metrics(values)

    def log_memory(self, of_all: bool = False) -> None:
        """Log memory peaks, if any were measured, and how they compare with the plan.

        Args:
            of_all: of several processes, log the largest values, and the peaks of each; all must call this.
        """
        own = self.memory.summary()
        summaries = group.gather(own) if of_all else [own]
        if not self.memory.peaks:
            return
        # If an earlier process did all the training, this one has no peak over all phases, only those of single phases.
        trained = "steady" in self.memory.peaks or not (
            self.tracker.resumed or self.config.training.resume_from_checkpoint
        )
        largest = {key: max(each.get(key, 0.0) for each in summaries) for key in own}
        self.log_metrics({f"memory/{key}": value for key, value in largest.items() if trained or "/" in key})
        if trained and len(summaries) > 1:
            peaks = [(rank, key, each[key]) for rank, each in enumerate(summaries) for key in each if "/" not in key]
            self.log_metrics({f"memory/rank{rank}/{key}": value for rank, key, value in peaks})
        alone = turns.current() is None  # a plan is that of a job alone
        self.log_metrics(calibration.ratio(self.metrics) if trained and alone else {})

    def finish(self) -> RunResult:
        """Log the time, the memory peaks and the summary, which need the complete run, and return the result."""
        # A resumed run has no record of how long it was interrupted; time that jobs share belongs to no one of them.
        if not self.tracker.resumed and turns.current() is None:
            self.log_metrics({"run_seconds": time.monotonic() - self.began})
        self.log_memory(of_all=True)
        if ranks().is_main:
            self.tracker.describe(summary.markdown(self.metrics))
        return RunResult(self.tracker.run_id, self.output_dir, self.metrics)


@contextmanager
def open_run(
    config: Config, resolved: Resolved, output_dir: str | Path, tags: Mapping[str, str], must_reach: bool
) -> Iterator[RunContext]:
    """Open the run's folder, log file and MLflow run; an exception inside the `with` block ends the run as failed.

    Raises:
        ConfigError: the folder cannot be written, or contains another run.
        TrackingError: MLflow cannot be reached, and `must_reach` is set.
    """
    # The command line starts with garbage collection off. What it imported is never garbage: `freeze` skips it.
    if not gc.isenabled():
        gc.enable()
        gc.freeze()
    hide_bars()
    place = ranks()
    folder = _writable(group.from_main(str(output_dir)))
    with (
        _logging_of_run(folder, LOG_FILE if place.is_main else f"{RANKS_FOLDER}/{place.rank}.log"),
        handle_signals(),
        fp32_precision_kept(),
        fast_products(resolved.device) as by_onednn,
        _tracked(config, folder, tags, must_reach) as tracker,
    ):
        log.info("run %s in %s on %s", tracker.run_id or "of rank 0", folder, resolved.place)
        if place.size > 1:
            log.info("rank %d of %d is process %d", place.rank, place.size, os.getpid())
            tracker.params({"resolved.topology": _topology(resolved)})
        if resolved.tuned:
            log.info("training.tune: %s", resolved.tuned)
        if resolved.optim_fallback:
            log.info("optimizer: %s is used, because %s", resolved.optim, resolved.optim_fallback)
        tracker.params({f"resolved.{key}": value for key, value in asdict(resolved).items() if value is not None})
        if by_onednn:
            tracker.params({"resolved.float32_products": "oneDNN"})
        tracker.tags({f"hardware.{key}": value for key, value in provenance.hardware().items()})
        reuse_freed_memory()
        run = RunContext(config, resolved, folder, tracker, MemoryMonitor(resolved.device))
        try:
            yield run
        except BaseException:  # for a run that is out of memory, the peaks matter most
            run.log_memory()
            raise


def _topology(resolved: Resolved) -> str:
    """Return the machines of the run, with their devices; all processes must call it."""
    places = Counter(group.gather((socket.gethostname(), resolved.device_name)))
    return "; ".join(f"{host}: {count} x {device}" for (host, device), count in places.items())


@contextmanager
def _tracked(config: Config, folder: Path, tags: Mapping[str, str], must_reach: bool) -> Iterator[Tracker]:
    """Track the run in the main process; the others follow it without logging."""
    if not ranks().is_main:
        with _ended_for_main(config, folder, tags):
            yield MutedTracker(folder, resumed=group.from_main(None))
        return
    with lifecycle.start(config, folder, tags, must_reach) as tracker:
        group.from_main(tracker.resumed)
        yield tracker


@contextmanager
def _ended_for_main(config: Config, folder: Path, tags: Mapping[str, str]) -> Iterator[None]:
    """In a process that does not track the run: record its end if the main process died and cannot do it."""

    def record(failure: RankError) -> None:
        if failure.rank == 0:
            try:
                lifecycle.record_dead_main(config, folder, tags, failure)
            except (OSError, UserError) as error:  # another process does it, or the folder is not on this machine
                log.warning("the end of the run is not recorded: %s", error)

    watch.at_failure(record)
    try:
        yield
    except BaseException as error:
        with ignore_signals():  # the launcher interrupts all
            if (failure := watch.cause(error)) is not None:
                record(failure)
        raise


def _writable(folder: str | Path) -> Path:
    path = Path(folder).resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(1024))
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {path}: {error.strerror}; choose another folder: hydra.run.dir=FOLDER"
        ) from error
    return path


@contextmanager
def _logging_of_run(folder: Path, name: str) -> Iterator[None]:
    """Copy all log messages inside the `with` block to the run's folder; a run that is refused leaves no log."""
    (folder / name).parent.mkdir(exist_ok=True)
    try:
        with _logging_to(folder / name):
            yield
    finally:
        if folder.is_dir() and not (folder / JOURNAL_FILE).exists():
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Copy all log messages inside the `with` block to `file`, without secrets."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [*before, handler] if ranks().is_main else [handler]  # the others would print the same again
    logging.getLogger("qlora_exp").setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = before
        handler.close()
