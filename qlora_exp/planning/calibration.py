"""What runs took against what was planned for them, and what that says of the next plan, for each kind of device.

Each run logs `plan/PHASE_mib` before it loads anything and `plan/memory_ratio` at its end; `qlora-exp calibrate` fits
what was measured as a line in what was planned, and keeps the fits in `mlruns/calibration.json`, which plans read.
Imports nothing heavy until it must.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Protocol

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
"""Of the fits, beside the runs that are tracked here."""
LEAST_RUNS = 3
PHASES = ("first_step", "steady", "evaluation")
"""Those that are compared: what loading takes besides weights is not planned."""
_PLAN = "plan.json"
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RecordedRun(Protocol):
    """What `fit` reads of a past run; `results.records.Record` has it."""

    @property
    def outcome(self) -> str:
        """`ok`, or how the run failed."""

    @property
    def params(self) -> Mapping[str, str]:
        """The parameters that it logged."""

    @property
    def tags(self) -> Mapping[str, str]:
        """Its tags."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of each metric."""


@dataclass(frozen=True)
class Calibration:
    """What runs on one kind of device took: `offset_mib` + `slope` times what was planned."""

    device: str
    runs: PositiveInt
    offset_mib: NotNegative
    slope: Positive
    median_error: NotNegative
    """Share of what was expected by which a run took more or less, the fit being that to all runs of other plans."""
    worst_error: NotNegative
    flops_per_second: Positive | None = None
    """Of training, the median."""
    time_error: NotNegative | None = None
    """Share by which the time of a step was missed by the median of all other runs, at worst."""

    def expected(self, planned: float) -> float:
        """Bytes that a run will take of which so many were planned."""
        return self.offset_mib * MIB + self.slope * planned


def plan_run(config: "Config", resolved: "Resolved", longest: int, evaluated: int) -> dict[str, float]:
    """What is planned for a run that is about to begin, as metrics; empty, with a word in the log, if it cannot be.

    Args:
        config: the run's.
        resolved: what became of its `auto`.
        longest: tokens of the longest training row.
        evaluated: tokens of the longest held-out row.
    """
    most = config.training.max_length
    longest, evaluated = most if config.training.packing else min(longest, most), min(evaluated, most)

    def plan(folder: Path) -> None:
        from qlora_exp.planning.planner import Planner

        found = Planner(config, resolved).predict(length=longest, evaluated=evaluated)
        metrics = {f"plan/{name}_mib": phase.reserved / MIB for name, phase in found.phases.items()}
        (folder / _PLAN).write_text(json.dumps(metrics | {"plan/peak_mib": found.peak / MIB}), "utf-8")

    try:  # once for all runs that differ in nothing that counts: seeds, learning rates
        folder = cache.built(f"plan-{_digest(config, resolved, longest, evaluated)}", plan)
    except UserError as error:
        log.info("not planned: %s", error)
        return {}
    metrics: dict[str, float] = json.loads((folder / _PLAN).read_text("utf-8"))
    log.info("planned: %s MiB at the fullest, the imports apart", f"{metrics['plan/peak_mib']:,.0f}")
    return metrics


def _digest(config: "Config", resolved: "Resolved", longest: int, evaluated: int) -> str:
    """Of what a plan may depend on."""
    apart = {*APART, "seed", "dataset", "unrelated", "evaluation"}
    values = config.model_dump(
        mode="json", exclude=dict.fromkeys(apart, True) | {"training": {"learning_rate", "max_steps"}}
    )
    base = run_key.model(config.model.model_name_or_path, config.model.revision)
    every = values, asdict(resolved), longest, evaluated, base, run_key.code(), libraries()
    return json_digest(every)


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


def fit(records: Iterable[RecordedRun]) -> tuple[dict[str, Calibration], list[str]]:
    """A calibration for each device that enough of these runs ran on, and what was left out.

    Runs of another version of this package count no more: it may have planned otherwise, or taken otherwise.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    older = 0
    for record in records:
        if record.outcome != "ok" or not _pairs(record.metrics):
            continue
        if record.tags.get("identity.code") != run_key.code():
            older += 1
            continue
        groups.setdefault(record.params.get("resolved.device_name", ""), []).append(record.metrics)
    told = [f"{older} runs of another version of qlora_exp"] * bool(older)
    told += [
        f"{name}: {len(runs)} different runs, too few ({LEAST_RUNS} or more)"
        for name, runs in groups.items()
        if len(runs) < LEAST_RUNS
    ]
    return {name: _fit(name, runs) for name, runs in groups.items() if len(runs) >= LEAST_RUNS}, told


def _fit(device: str, runs: Sequence[Mapping[str, float]]) -> Calibration:
    pairs = [_pairs(run) for run in runs]
    peaks = [(max(planned for planned, _ in own), max(took for _, took in own)) for own in pairs]
    errors = []
    for planned, took in peaks:  # runs of the same plan know its answer: they are left out with it
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
    """Offset and slope, neither below zero, with the least squares of shares of the plan.

    Through the origin if the plans are too much alike (of peaks the largest is not twice the smallest) to tell both.
    """
    import numpy as np
    from scipy.optimize import nnls

    planned, took = (np.array(one) for one in zip(*(pair for own in runs for pair in own), strict=True))
    peaks = [max(plan for plan, _ in own) for own in runs]
    if max(peaks) >= 2 * min(peaks):
        (offset, slope), _ = nnls(np.column_stack([1 / planned, np.ones_like(planned)]), took / planned)
        if slope > 0:
            return float(offset), float(slope)
    return 0.0, float(np.mean(took / planned))


def write(found: Iterable[Calibration], folder: Path = FOLDER) -> Path:
    """Keep the fits in `folder`, beside those of other devices that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    every = {one.device: one for one in (*read(folder), *found)}
    write_atomically(folder / FILE, json.dumps([asdict(one) for one in every.values()], indent=2) + "\n")
    return folder / FILE


def read(folder: Path = FOLDER) -> list[Calibration]:
    """The fits that are kept in `folder`; none if there are none.

    Raises:
        ConfigError: the file is not what `write` wrote.
    """
    if not (file := folder / FILE).is_file():
        return []
    try:
        return [Calibration(**one) for one in json.loads(file.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(
            f"{file} is damaged: delete it, and `qlora-exp calibrate` makes it anew ({first:.200})"
        ) from error
