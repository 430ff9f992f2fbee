"""Which jobs of a sweep would not fit their device, planned in processes of their own: they import, and touch a GPU.

Imports nothing heavy in the sweep's own process.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from qlora_exp import calibration
from qlora_exp.errors import UserError
from qlora_exp.quiet import quiet
from qlora_exp.schema import Config

log = logging.getLogger(__name__)


def unfit(configs: Sequence[Config], vram: float | None) -> list[str]:
    """For each run why it does not fit; empty if it does, may, or cannot be planned.

    Args:
        configs: of the runs, whose rows are taken to be as long as `training.max_length`.
        vram: GiB of the GPU that they will have; None is the device that is here.
    """
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        return list(pool.map(partial(_why, vram=vram, store=Path("mlruns").resolve()), configs))


def _why(config: Config, vram: float | None, store: Path) -> str:
    quiet()
    from qlora_exp.fit import GIB, expected, verdict
    from qlora_exp.gpus import here
    from qlora_exp.plan import planner

    try:
        gpu = here(config, vram).calibrated(calibration.read(store))
        prediction = planner(config, gpu.device).predict()
    except UserError as error:
        log.warning("not planned, so it is run: %s", error)
        return ""
    if verdict(prediction, gpu) != "does not fit":
        return ""
    return f"does not fit: {expected(prediction, gpu) / GIB:.1f} GiB are expected, {gpu.name} has {gpu.memory_gib:g}"
