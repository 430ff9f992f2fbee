"""Choose how the run computes its steps, if `training.tune` asks for it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from qlora_exp.config.schema import Config
from qlora_exp.data import columns
from qlora_exp.distributed import group
from qlora_exp.environment import memory
from qlora_exp.environment.device import Resolved
from qlora_exp.environment.ranks import ranks
from qlora_exp.planning import calibration, gpus, tuning
from qlora_exp.planning.fit import room
from qlora_exp.planning.gpus import DRIVER_GIB, Gpu
from qlora_exp.recipe.inputs import Inputs
from qlora_exp.recipe.tokens import Tokens
from qlora_exp.utils import cache
from qlora_exp.utils.errors import UserError
from qlora_exp.utils.units import GIB

log = logging.getLogger(__name__)

_CHOICE = "choice.json"


def tune(config: Config, inputs: Inputs, tokens: Tokens) -> Inputs:
    """Return the inputs with the way to compute a step that `training.tune` chooses; all processes take the same.

    A choice is kept in the cache, so that runs on this machine that differ only in what speed does not depend on
    (seeds, learning rates) are computed alike. Runs that cannot be planned are computed as configured, with a warning.
    """
    if config.training.tune is None:
        return inputs
    lengths = columns.lengths(tokens.train).tolist()
    evaluated = int(columns.lengths(tokens.heldout).max())
    try:
        choice = group.call_on_main(_choice, config, inputs.resolved, lengths, evaluated)
    except UserError as error:
        log.warning("training.tune: computed as configured: %s", error)
        return replace(inputs, resolved=replace(inputs.resolved, tuned=f"as configured: {error}"))
    if not choice.fits:
        log.warning("training.tune: what was chosen is planned not to fit what is free now; it may run out of memory")
    return replace(inputs, resolved=choice.applied(inputs.resolved))


def _choice(config: Config, resolved: Resolved, lengths: Sequence[int], evaluated: int) -> tuning.Choice:
    device = _with_free_memory(config).calibrated(calibration.read())

    def choose(folder: Path) -> None:
        rates = tuning.measured(config, resolved, lengths)
        choice = tuning.choose(config, resolved, lengths, evaluated, device, rates)
        (folder / _CHOICE).write_text(json.dumps(asdict(choice)), "utf-8")

    # Without the free memory, which differs from run to run: runs with other seeds must be computed alike.
    limit = memory.capacity()[0] if device.limited_by else 0
    depends_on = sorted(lengths), evaluated, device.calibration, torch.get_num_threads(), limit
    folder = cache.built(f"tune-{calibration.digest(config, resolved, *depends_on)}", choose)
    kept = tuning.Choice(**json.loads((folder / _CHOICE).read_text("utf-8")))
    return replace(kept, fits=kept.peak <= room(device, ranks=resolved.num_processes))


def _with_free_memory(config: Config) -> Gpu:
    """Return this device with the memory that is free for this process; the CPU's is shared by those of a machine."""
    device = gpus.here(config, None)
    if device.type == "cpu":
        return replace(device, memory_gib=memory.free() / GIB / ranks().local_size)
    free, total = torch.cuda.mem_get_info()
    return replace(device, memory_gib=min(free / GIB + DRIVER_GIB, total / GIB))  # the driver has its share already
