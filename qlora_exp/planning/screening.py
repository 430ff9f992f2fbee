"""Find the jobs of a sweep that exceed the memory of their device.

Planning runs in separate processes, because it imports heavy libraries and initializes a GPU; the sweep's own process
does neither.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_exp.config.schema import Config
from qlora_exp.planning import calibration
from qlora_exp.planning.gpus import Gpu, here
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import UserError
from qlora_exp.utils.processes import workers
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import GIB

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Prediction

log = logging.getLogger(__name__)
_START = "forkserver"  # a sweep with jobs has a fork server with the libraries loaded


def unfit(configs: Sequence[Config], vram: float | None) -> list[str]:
    """Return for each run the reason why it does not fit; empty if it fits, may fit, or cannot be planned.

    The first reason also says with which changes that run would fit.

    Args:
        configs: the configs of the runs. All rows are assumed to have `training.max_length` tokens.
        vram: memory in GiB of the GPU that the runs will use; None: the device of this machine.

    Raises:
        ConfigError: the calibration file is damaged, or this machine does not have the device.
    """
    asked = [*zip(configs, _devices(configs, vram), strict=True)]
    alike = [json_digest(calibration.planned_values(config)) for config in configs]  # seeds and rates change no plan
    with workers.workers(len({*alike}), _START) as pool:
        waiting_for = {key: pool.submit(_why, *each) for key, each in dict(zip(alike, asked, strict=True)).items()}
        reasons = [workers.result(waiting_for[key]) for key in alike]
        first = next((each for each, reason in zip(asked, reasons, strict=True) if reason), None)
        if first is not None:
            reasons[asked.index(first)] += f"; {workers.result(pool.submit(_advice, *first))}"
        return reasons


def most_together(configs: Sequence[Config], vram: float | None, rows_together: bool, most: int) -> int:
    """Return how many of these runs fit a device at once, if they share their base model; at least 1, at most `most`.

    A group takes what its largest run takes, with the rows of all if they go through the base in one pass, and what
    the others train: adapters, gradients, optimizer states.

    Args:
        configs: the configs of the runs.
        vram: memory in GiB of the GPU that the runs will use; None: the device of this machine.
        rows_together: whether the rows of all runs go through the base in one pass.
        most: largest number to consider.
    """
    gpus = _devices(configs, vram)
    with workers.workers(len(configs), _START) as pool:
        parts = [pool.submit(_part, config, gpu) for config, gpu in zip(configs, gpus, strict=True)]
        found = [workers.result(future) for future in parts]
        if any(part is None for part in found):
            return 1
        order = sorted(range(len(found)), key=lambda index: found[index], reverse=True)
        owns = [found[index][1] for index in order]
        largest = configs[order[0]], gpus[order[0]]
        fits = [
            pool.submit(_group_fits, *largest, number if rows_together else 1, sum(owns[1:number]))
            for number in range(2, most + 1)
        ]
        return 1 + sum(itertools.takewhile(bool, map(workers.result, fits)))


def _devices(configs: Sequence[Config], vram: float | None) -> list[Gpu]:
    """Return the calibrated device of each run."""
    calibrations = calibration.read()
    kinds = {(config.device, config.quantization.bitsandbytes): config for config in configs}
    with workers.workers(1, _START) as pool:  # a single process initializes the GPU, not all of them
        waiting = [pool.submit(here, config, vram) for config in kinds.values()]
        gpus = {
            kind: workers.result(future).calibrated(calibrations) for kind, future in zip(kinds, waiting, strict=True)
        }
    return [gpus[config.device, config.quantization.bitsandbytes] for config in configs]


def _part(config: Config, gpu: Gpu) -> tuple[int, int] | None:
    """Return the planned peak of a run, and what of it is the run's own if its base is shared; None without a plan."""
    quiet()

    try:
        prediction = _predicted(config, gpu)
    except UserError as error:
        log.warning("sweep.fuse=auto: jobs are run alone, because they cannot be planned: %s", error)
        return None
    kinds = prediction.phases["steady"].kinds
    return prediction.peak, sum(kinds.get(kind, 0) for kind in ("trainable", "gradients", "optimizer"))


def _group_fits(config: Config, gpu: Gpu, times: int, own: int) -> bool:
    """Return whether the rows of so many runs fit in one pass, together with what the others train."""
    quiet()
    from qlora_exp.planning.fit import room

    return _predicted(config, gpu, times).peak + own <= room(gpu)


def _predicted(config: Config, gpu: Gpu, times: int = 1) -> "Prediction":
    """Predict a run on a device, as `training.tune` would have it computed there, or so many of them in one pass."""
    from qlora_exp.planning import tuning
    from qlora_exp.planning.planner import Planner, resolved_on

    resolved = tuning.planned(config, resolved_on(config, gpu.device), gpu)
    return Planner(config, resolved).predict(jobs=times)


def _why(config: Config, gpu: Gpu) -> str:
    quiet()
    from qlora_exp.planning.fit import expected, verdict

    try:
        prediction = _predicted(config, gpu)
    except UserError as error:
        log.warning("cannot check whether a job fits, so it will run: %s", error)
        return ""
    if verdict(prediction, gpu) != "does not fit":
        return ""
    needed = expected(prediction, gpu) / GIB
    return f"does not fit: needs about {needed:.1f} GiB, and there are {gpu.where}"


def _advice(config: Config, gpu: Gpu) -> str:
    quiet()
    from qlora_exp.planning.guidance.remedies import advice, remedies

    return advice(remedies(config, gpu), gpu)
