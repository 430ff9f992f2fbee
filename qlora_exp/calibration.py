"""What runs took against what was planned for them, and what that says of the next plan, for each kind of device.

Each run logs `plan/PHASE_mib` before it loads anything and `plan/memory_ratio` at its end; `qlora-exp calibrate` fits
what was measured as a line in what was planned, and keeps the fits in `mlruns/calibration.json`, which plans read.
Imports nothing heavy until it must.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from qlora_exp.errors import ConfigError, UserError
from qlora_exp.journal import write_atomically

if TYPE_CHECKING:
    from qlora_exp.device import Resolved
    from qlora_exp.records import Record
    from qlora_exp.schema import Config

log = logging.getLogger(__name__)

FILE = "calibration.json"
LEAST_RUNS = 3
PHASES = ("first_step", "steady", "evaluation")
"""Those that are compared: what loading takes besides weights is not planned."""
_MIB = 1024**2


@dataclass(frozen=True)
class Calibration:
    """What runs on one kind of device took: `offset_mib` + `slope` times what was planned."""

    device: str
    runs: int
    offset_mib: float
    slope: float
    median_error: float
    """Share by which a run's peak was missed by the line through all other runs."""
    worst_error: float
    flops_per_second: float | None = None
    """Of training, the median."""
    time_error: float | None = None
    """Share by which the time of a step was missed by the median of all other runs, at worst."""

    def __post_init__(self) -> None:
        numbers = (self.offset_mib, self.slope, self.median_error, self.worst_error)
        if not (all(math.isfinite(one) for one in numbers) and self.slope > 0 and self.worst_error >= 0):
            raise ValueError(f"no fit: {self}")

    def expected(self, planned: float) -> float:
        """Bytes that a run will take of which so many were planned."""
        return self.offset_mib * _MIB + self.slope * planned


def plan_run(config: "Config", resolved: "Resolved", longest: int, evaluated: int) -> dict[str, float]:
    """What is planned for a run that is about to begin, as metrics; empty, with a word in the log, if it cannot be.

    Args:
        config: the run's.
        resolved: what became of its `auto`.
        longest: tokens of the longest training row.
        evaluated: tokens of the longest held-out row.
    """
    from qlora_exp.plan import Planner

    try:
        found = Planner(config, resolved).predict(length=longest, evaluated=evaluated)
    except UserError as error:
        log.info("not planned: %s", error)
        return {}
    except Exception as error:  # code that was not made for fake tensors may raise anything; the run goes on
        log.warning("not planned: %s: %s", type(error).__name__, error)
        return {}
    log.info("planned: %s MiB at the fullest, the imports apart", f"{found.peak / _MIB:,.0f}")
    metrics = {f"plan/{name}_mib": phase.reserved / _MIB for name, phase in found.phases.items()}
    return metrics | {"plan/peak_mib": found.peak / _MIB}


def measured(metrics: Mapping[str, float], phase: str) -> float | None:
    """MiB at the fullest of a phase, of the kind that plans are of: reserved on a GPU, else without the imports."""
    if (reserved := metrics.get(f"memory/{phase}/reserved_peak_mib")) is not None:
        return reserved
    rss, before = (metrics.get(key) for key in (f"memory/{phase}/rss_peak_mib", "memory/baseline/rss_mib"))
    return rss - before if rss is not None and before is not None else None


def ratio(metrics: Mapping[str, float]) -> dict[str, float]:
    """`plan/memory_ratio`: measured over planned, each at its fullest; empty if one of them is not known."""
    pairs = _pairs(metrics)
    if not pairs:
        return {}
    return {"plan/memory_ratio": max(took for _, took in pairs) / max(planned for planned, _ in pairs)}


def _pairs(metrics: Mapping[str, float]) -> list[tuple[float, float]]:
    """MiB planned and measured, of each phase."""
    pairs = [(metrics.get(f"plan/{phase}_mib"), measured(metrics, phase)) for phase in PHASES]
    return [(planned, took) for planned, took in pairs if planned and took and took > 0]


def fit(records: Iterable["Record"]) -> tuple[dict[str, Calibration], dict[str, int]]:
    """A calibration for each device that enough of these runs ran on, and how many ran on others."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for record in records:
        if record.outcome == "ok" and _pairs(record.metrics):
            groups.setdefault(record.params.get("resolved.device_name", ""), []).append(record.metrics)
    enough = {name: runs for name, runs in groups.items() if len(runs) >= LEAST_RUNS}
    return (
        {name: _fit(name, runs) for name, runs in enough.items()},
        {name: len(runs) for name, runs in groups.items() if name not in enough},
    )


def _fit(device: str, runs: Sequence[Mapping[str, float]]) -> Calibration:
    pairs = [_pairs(run) for run in runs]
    errors = []
    for place, own in enumerate(pairs):
        offset, slope = _line([pair for other in (*pairs[:place], *pairs[place + 1 :]) for pair in other])
        planned, took = (max(one) for one in zip(*own, strict=True))
        errors.append(abs((offset + slope * planned) / took - 1))
    offset, slope = _line([pair for own in pairs for pair in own])
    rates = [run["flops_per_second"] for run in runs if run.get("flops_per_second", 0) > 0]
    rate = time_error = None
    if len(rates) >= LEAST_RUNS:
        others = [median([*rates[:place], *rates[place + 1 :]]) for place in range(len(rates))]
        rate, time_error = median(rates), max(abs(own / other - 1) for own, other in zip(rates, others, strict=True))
    return Calibration(device, len(runs), offset, slope, median(errors), max(errors), rate, time_error)


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Offset and slope with the least squares of relative errors; if that is no growing line, through the origin."""
    import numpy as np

    planned, took = (np.array(one) for one in zip(*pairs, strict=True))
    if np.ptp(planned) > 0:
        (offset, slope), *_ = np.linalg.lstsq(np.column_stack([1 / took, planned / took]), np.ones_like(took))
        if slope > 0:
            return float(offset), float(slope)
    return 0.0, float(np.median(took / planned))


def write(found: Iterable[Calibration], folder: Path) -> Path:
    """Keep the fits in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return folder / FILE


def read(folder: Path) -> list[Calibration]:
    """The fits that are kept in `folder`; none if there are none.

    Raises:
        ConfigError: the file is not what `write` wrote.
    """
    if not (file := folder / FILE).is_file():
        return []
    try:
        return [Calibration(**one) for one in json.loads(file.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: {error}; `qlora-exp calibrate` makes it anew") from error
