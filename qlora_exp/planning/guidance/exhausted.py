"""Say with which settings a run that ran out of memory would fit.

The plans are made by a process of its own, which this module is the main module of: the run's process may have no
memory left, and its plans must not keep it from ending.
"""

import gc
import json
import logging
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.config.validate import from_dict
from qlora_exp.environment import turns
from qlora_exp.environment.memory import capacity, free
from qlora_exp.environment.ranks import ranks
from qlora_exp.planning import calibration
from qlora_exp.planning.fit import needed_for, room
from qlora_exp.planning.gpus import DRIVER_GIB, Gpu, here
from qlora_exp.planning.guidance import remedies
from qlora_exp.utils.errors import MemoryExhaustedError, RankError, is_out_of_memory, type_and_first_line
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import GIB

log = logging.getLogger(__name__)

_SECONDS = 180.0
_LESS = 0.9
"""Largest part of what was planned for a run that ran out of memory that may be planned for one that would fit."""


@contextmanager
def explained(config: Config, longest: Callable[[], int] | None = None) -> Iterator[None]:
    """Raise an error about memory inside the `with` block as one that names settings with which the run would fit.

    Args:
        config: the config of the run.
        longest: returns the tokens of its longest row; None: it has `training.max_length`.

    Raises:
        MemoryExhaustedError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        of_rank = isinstance(error, RankError) and error.outcome == "oom"
        # Jobs that ran out of memory beside others run again. Of several processes, the one that started them plans.
        alone = turns.current() is None and ranks().size == 1
        if not (of_rank or is_out_of_memory(error)) or isinstance(error, MemoryExhaustedError) or not alone:
            raise
        what = type_and_first_line(error)
        _free(error)
        try:
            found = advice(config, longest and longest())
        except (KeyboardInterrupt, SystemExit):  # nobody waits for it; the run ended because memory ran out
            found = _general(config)
        raise MemoryExhaustedError(f"out of memory; {found} ({what})") from error


def advice(config: Config, longest: int | None = None) -> str:
    """Return with which settings the run would fit, as planned by another process; general advice if it cannot be."""
    log.info("out of memory: planning what would fit, which may take a minute (Ctrl+C skips it)")
    training = config.training
    if longest is not None and longest < training.max_length and not training.packing:
        training = training.model_copy(update={"max_length": longest})
    values = config.model_copy(update={"training": training}).model_dump(mode="json")
    request = json.dumps({"config": values, "free_gib": _free_of_gpu(config)})
    command = [sys.executable, "-m", "qlora_exp.planning.guidance.exhausted"]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return str(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        log.info("what would fit could not be planned: %s", type_and_first_line(error))
        return _general(config)


def _general(config: Config) -> str:
    """Return changes that take less memory, which were not planned."""
    training = config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    less = []
    if training.per_device_train_batch_size > 1:
        less.append(f"training.per_device_train_batch_size=1 training.gradient_accumulation_steps={rows}")
    if training.gradient_checkpointing is not True and not config.refusal("gradient_checkpointing"):
        less.append("training.gradient_checkpointing=true")
    if config.method.name in ("full", "lora"):
        less.append("method=qlora")
    less.append(f"training.max_length={max(1, training.max_length // 2)}")
    return f"less memory is taken with {', or with '.join(less)}; `qlora-exp plan` says how much"


def _free(error: BaseException) -> None:
    """Free what the frames of an error hold, such as the model."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()


def _free_of_gpu(config: Config) -> float | None:
    """Return the GiB of the run's GPU that a run could have, with the driver's; None for a run on a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or config.device not in ("auto", "cuda") or not torch.cuda.is_initialized():
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return float(min((free + torch.cuda.memory_reserved()) / GIB + DRIVER_GIB, total / GIB))


def _device(config: Config, free_gib: float | None) -> Gpu:
    """Return this device with the memory that a run can have now."""
    device = here(config, None)
    if device.type != "cpu":
        return device if free_gib is None else replace(device, memory_gib=free_gib)
    left, by = free(), device.limited_by
    return replace(device, memory_gib=left / GIB, limited_by=by if left >= capacity()[0] else "")


def planned(config: Config, free_gib: float | None) -> str:
    """Return with which settings a run that ran out of memory would fit.

    Raises:
        UserError: it cannot be planned.
    """
    from qlora_exp.planning.planner import planner

    device = _device(config, free_gib).calibrated(calibration.read())
    plan = planner(config, device.device).predict()
    left, less = room(device, ranks=plan.ranks), _LESS * plan.peak
    most, by = (left, device.limited_by) if left < less else (less, "")
    smaller = replace(device, memory_gib=needed_for(most, device, plan.ranks), limited_by=by)
    return remedies.advice(remedies.remedies(config, smaller), smaller)


def main() -> None:
    """Read a request from standard input, and print the advice as JSON."""
    quiet()
    request: dict[str, Any] = json.load(sys.stdin)
    found = planned(from_dict(request["config"]), request["free_gib"])
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
