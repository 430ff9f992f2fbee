"""Correct plans with what runs measured, for each kind of device.

Each run logs `plan/PHASE_mib` before it loads anything and `plan/memory_ratio` at its end. `qlora-exp calibrate` fits
measured memory as a linear function of planned memory and writes the fits to `mlruns/calibration.json`, which later
plans read. Heavy libraries are imported only when they are needed.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from qlora_exp.config.values import APART
from qlora_exp.environment.provenance import libraries
from qlora_exp.tracking import run_key
from qlora_exp.utils import cache
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.units import MIB

if TYPE_CHECKING:
    from qlora_exp.config.schema import Config
    from qlora_exp.environment.device import Resolved

log = logging.getLogger(__name__)

FILE = "calibration.json"
FOLDER = Path("mlruns")
"""Folder of the fits: the one where local runs are tracked."""
LEAST_RUNS = 3
PHASES = ("first_step", "steady", "evaluation")
"""Phases that are compared. Loading is not: what it needs in addition to the weights is not planned."""
_PLAN = "plan.json"
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RecordedRun(Protocol):
    """The attributes of a past run that `fit` reads; `results.record.Record` has them."""

    @property
    def outcome(self) -> str:
        """`ok`, or how the run failed."""

    @property
    def params(self) -> Mapping[str, str]:
        """The logged parameters."""

    @property
    def tags(self) -> Mapping[str, str]:
        """The tags of its MLflow run."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of each metric."""


@dataclass(frozen=True)
class Calibration:
    """Fit of the memory that runs on one kind of device took: `offset_mib` + `slope` x planned memory."""

    device: str
    runs: PositiveInt
    offset_mib: NotNegative
    slope: Positive
    median_error: NotNegative
    """Median relative error of the expected memory of a run, with the fit made without all runs of the same plan."""
    worst_error: NotNegative
    flops_per_second: Positive | None = None
    """Median rate of training."""
    time_error: NotNegative | None = None
    """Worst relative error of a step's time when it is predicted from the median rate of all other runs."""

    def expected(self, planned: float) -> float:
        """Return the bytes that a run with `planned` bytes is expected to take."""
        return self.offset_mib * MIB + self.slope * planned


def plan_run(config: "Config", resolved: "Resolved", longest: int, evaluated: int) -> dict[str, float]:
    """Plan a run that is about to start.

    Args:
        config: the config of the run.
        resolved: the values that its `auto` settings resolved to.
        longest: tokens of the longest training row.
        evaluated: tokens of the longest held-out row.

    Returns:
        Metrics `plan/PHASE_mib` and `plan/peak_mib`; empty if the run cannot be planned, with the reason in the log.
    """
    most = config.training.max_length
    longest, evaluated = most if config.training.packing else min(longest, most), min(evaluated, most)

    def plan(folder: Path) -> None:
        from qlora_exp.planning.planner import Planner

        prediction = Planner(config, resolved).predict(length=longest, evaluated=evaluated)
        metrics = {f"plan/{name}_mib": phase.reserved / MIB for name, phase in prediction.phases.items()}
        (folder / _PLAN).write_text(json.dumps(metrics | {"plan/peak_mib": prediction.peak / MIB}), "utf-8")

    try:  # runs that differ only in what memory does not depend on (seeds, learning rates) share one plan
        folder = cache.built(f"plan-{digest(config, resolved, longest, evaluated)}", plan)
    except UserError as error:
        log.info("not planned: %s", error)
        return {}
    metrics: dict[str, float] = json.loads((folder / _PLAN).read_text("utf-8"))
    log.info("planned peak memory: %s MiB, not counting imported libraries", f"{metrics['plan/peak_mib']:,.0f}")
    return metrics


def digest(config: "Config", resolved: "Resolved", *more: Any) -> str:
    """Return a digest of everything that a plan may depend on; `more` are lengths of rows and what else it uses."""
    values = planned_values(config)
    base = run_key.model_version(config.model.model_name_or_path, config.model.revision)
    parts = values, asdict(resolved), more, base, run_key.code_digest(), libraries()
    return json_digest(parts)


def planned_values(config: "Config") -> dict[str, Any]:
    """Return the values that a plan may depend on."""
    apart = {*APART, "seed", "dataset", "unrelated", "evaluation"}
    return config.model_dump(
        mode="json", exclude=dict.fromkeys(apart, True) | {"training": {"learning_rate", "max_steps"}}
    )


def measured(metrics: Mapping[str, float], phase: str) -> float | None:
    """Return the measured peak of a phase in MiB, in the kind of memory that plans predict; None if not measured.

    That is reserved memory on a GPU, else resident memory beyond what the process had after its imports.
    """
    if (reserved := metrics.get(f"memory/{phase}/reserved_peak_mib")) is not None:
        return reserved
    rss, before = (metrics.get(key) for key in (f"memory/{phase}/rss_peak_mib", "memory/baseline/rss_mib"))
    return rss - before if rss is not None and before is not None else None


def ratio(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metric `plan/memory_ratio`, measured peak over planned peak; empty if one of the two is missing."""
    pairs = _pairs(metrics)
    if not pairs:
        return {}
    return {"plan/memory_ratio": max(took for _, took in pairs) / max(planned for planned, _ in pairs)}


def _pairs(metrics: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return planned and measured MiB of each phase that has both."""
    pairs = [(metrics.get(f"plan/{phase}_mib"), measured(metrics, phase)) for phase in PHASES]
    return [(planned, took) for planned, took in pairs if planned and took and took > 0]


def fit(records: Iterable[RecordedRun]) -> tuple[dict[str, Calibration], list[str]]:
    """Fit a calibration for each device with at least LEAST_RUNS of the runs.

    Runs of another version of this package are left out: its plans or its memory use may differ.

    Returns:
        Calibrations by name of the device, and messages about the runs that were left out.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    older = 0
    for record in records:
        if record.outcome != "ok" or not _pairs(record.metrics):
            continue
        if record.tags.get("identity.code") != run_key.code_digest():
            older += 1
            continue
        groups.setdefault(record.params.get("resolved.device_name", ""), []).append(record.metrics)
    left_out = [f"{older} runs of another version of qlora_exp"] * bool(older)
    left_out += [
        f"{name}: {len(runs)} different runs, too few ({LEAST_RUNS} are needed)"
        for name, runs in groups.items()
        if len(runs) < LEAST_RUNS
    ]
    return {name: _fit(name, runs) for name, runs in groups.items() if len(runs) >= LEAST_RUNS}, left_out


def _fit(device: str, runs: Sequence[Mapping[str, float]]) -> Calibration:
    pairs = [_pairs(run) for run in runs]
    peaks = [(max(planned for planned, _ in own), max(took for _, took in own)) for own in pairs]
    errors = []
    for planned, took in peaks:  # runs of the same plan would give the answer away: they are left out too
        others = [
            own for own, (peak, _) in zip(pairs, peaks, strict=True) if not math.isclose(peak, planned, rel_tol=0.01)
        ]
        offset, slope = _line(others or pairs)
        errors.append(abs(took / (offset + slope * planned) - 1))
    offset, slope = _line(pairs)
    rates = [run["flops_per_second"] for run in runs if run.get("flops_per_second", 0) > 0]
    rate = time_error = None
    if len(rates) >= LEAST_RUNS:
        medians = [median([*rates[:place], *rates[place + 1 :]]) for place in range(len(rates))]
        rate, time_error = median(rates), max(abs(other / own - 1) for own, other in zip(rates, medians, strict=True))
    return Calibration(device, len(runs), offset, slope, median(errors), max(errors), rate, time_error)


def _line(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Return offset and slope, neither below zero, that minimize the squared errors relative to the plan.

    The line goes through the origin if the plans are too similar to determine both (the largest peak is less than twice
    the smallest).
    """
    import numpy as np
    from scipy.optimize import nnls

    planned, took = (np.array(values) for values in zip(*(pair for own in runs for pair in own), strict=True))
    peaks = [max(plan for plan, _ in own) for own in runs]
    if max(peaks) >= 2 * min(peaks):
        (offset, slope), _ = nnls(np.column_stack([1 / planned, np.ones_like(planned)]), took / planned)
        if slope > 0:
            return float(offset), float(slope)
    return 0.0, float(np.mean(took / planned))


def write(fits: Iterable[Calibration], folder: Path = FOLDER) -> Path:
    """Write the fits to FILE in `folder`; fits of other devices in that file stay. Return the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    by_device = {fit.device: fit for fit in (*read(folder), *fits)}
    write_atomically(folder / FILE, json.dumps([asdict(fit) for fit in by_device.values()], indent=2) + "\n")
    return folder / FILE


def read(folder: Path = FOLDER) -> list[Calibration]:
    """Read the fits that `write` wrote to `folder`; an empty list if there is no file.

    Raises:
        ConfigError: the file is damaged.
    """
    if not (file := folder / FILE).is_file():
        return []
    try:
        return [Calibration(**values) for values in json.loads(file.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(
            f"{file} is damaged: delete it and run `qlora-exp calibrate` to write it again ({first:.200})"
        ) from error
