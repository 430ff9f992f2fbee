"""Find the jobs of a sweep that exceed the memory of their device.

Planning runs in separate processes, because it imports heavy libraries and initializes a GPU; the sweep's own process
does neither.
"""

import logging
from collections.abc import Sequence

from qlora_exp.config.schema import Config
from qlora_exp.planning import calibration
from qlora_exp.planning.gpus import Gpu, here
from qlora_exp.utils.errors import UserError
from qlora_exp.utils.processes import workers
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import GIB

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
    calibrations = calibration.read()
    kinds = {(config.device, config.quantization.bitsandbytes): config for config in configs}
    with workers.workers(1, _START) as pool:  # a single process initializes the GPU, not all of them
        waiting = [pool.submit(here, config, vram) for config in kinds.values()]
        gpus = {
            kind: workers.result(future).calibrated(calibrations) for kind, future in zip(kinds, waiting, strict=True)
        }
    with workers.workers(len(configs), _START) as pool:
        asked = [(config, gpus[config.device, config.quantization.bitsandbytes]) for config in configs]
        waiting_for = [pool.submit(_why, *each) for each in asked]
        reasons = [workers.result(future) for future in waiting_for]
        first = next((each for each, reason in zip(asked, reasons, strict=True) if reason), None)
        if first is not None:
            reasons[asked.index(first)] += f"; {workers.result(pool.submit(_advice, *first))}"
        return reasons


def _why(config: Config, gpu: Gpu) -> str:
    quiet()
    from qlora_exp.planning.fit import expected, verdict
    from qlora_exp.planning.planner import planner

    try:
        prediction = planner(config, gpu.device).predict()
    except UserError as error:
        log.warning("cannot check whether a job fits, so it will run: %s", error)
        return ""
    if verdict(prediction, gpu) != "does not fit":
        return ""
    needed = expected(prediction, gpu) / GIB
    return f"does not fit: needs about {needed:.1f} GiB, but {gpu.name} has {gpu.memory_gib:g} GiB"


def _advice(config: Config, gpu: Gpu) -> str:
    quiet()
    from qlora_exp.planning.advisor import advice, remedies

    return advice(remedies(config, gpu))
