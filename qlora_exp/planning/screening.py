"""Which jobs of a sweep would not fit their device, planned in processes of their own: they import, and touch a GPU.

Imports nothing heavy in the sweep's own process.
"""

import logging
from collections.abc import Sequence

from qlora_exp.config.schema import Config
from qlora_exp.planning import calibration
from qlora_exp.planning.gpus import Gpu, here
from qlora_exp.utils import workers
from qlora_exp.utils.errors import UserError
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import GIB

log = logging.getLogger(__name__)
_START = "forkserver"  # where there are jobs, it has the libraries loaded


def unfit(configs: Sequence[Config], vram: float | None) -> list[str]:
    """For each run why it does not fit; empty if it does, may, or cannot be planned.

    Args:
        configs: of the runs, whose rows are taken to be as long as `training.max_length`.
        vram: GiB of the GPU that they will have; None is the device that is here.

    Raises:
        ConfigError: the calibration that is kept here is damaged, or a device is not here.
    """
    known = calibration.read()
    kinds = {(one.device, one.quantization.bitsandbytes): one for one in configs}
    with workers.workers(1, _START) as pool:  # one process asks the GPU, not all
        asked = [pool.submit(here, one, vram) for one in kinds.values()]
        gpus = {kind: workers.result(future).calibrated(known) for kind, future in zip(kinds, asked, strict=True)}
    with workers.workers(len(configs), _START) as pool:
        waiting = [pool.submit(_why, one, gpus[one.device, one.quantization.bitsandbytes]) for one in configs]
        return [workers.result(future) for future in waiting]


def _why(config: Config, gpu: Gpu) -> str:
    quiet()
    from qlora_exp.planning.fit import expected, verdict
    from qlora_exp.planning.planner import planner

    try:
        prediction = planner(config, gpu.device).predict()
    except UserError as error:
        log.warning("not planned, so it is run: %s", error)
        return ""
    if verdict(prediction, gpu) != "does not fit":
        return ""
    return f"does not fit: {expected(prediction, gpu) / GIB:.1f} GiB are expected, {gpu.name} has {gpu.memory_gib:g}"
