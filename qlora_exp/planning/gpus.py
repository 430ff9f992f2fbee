"""What is known of GPUs: memory, arithmetic, bandwidth, as their makers publish them; what runs here said of them.

Sources: NVIDIA's data sheets and architecture papers; memory as the driver reports it. None of these was measured here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import psutil

from qlora_exp.config.schema import Config
from qlora_exp.environment.device import Device, cpu_name, detect
from qlora_exp.planning.calibration import Calibration
from qlora_exp.utils.errors import ConfigError, did_you_mean
from qlora_exp.utils.units import GIB

DRIVER_GIB = 0.6
"""Taken on each GPU by the driver's context and the libraries' workspaces: an allowance, not a measurement."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, or this machine's CPU."""

    name: str
    memory_gib: float
    tflops: float = 0.0
    """Dense matrix products in 16 bits, summed in float32; 0: not known."""
    gb_per_s: float = 0.0
    """Of its memory; 0: not known."""
    bf16: bool = True
    type: str = "cuda"
    calibration: Calibration | None = None

    @property
    def device(self) -> Device:
        """What a run on it would detect."""
        return Device(self.type, self.name, bf16=self.bf16, paging=self.type == "cuda")

    @property
    def rates(self) -> str:
        """Whose rates its times are at."""
        if self.calibration and self.calibration.flops_per_second:
            return f"the median rate of {self.calibration.runs} runs on it"
        return "the maker's rates"

    def calibrated(self, known: Iterable[Calibration]) -> "Gpu":
        """With what runs on this kind said, if there were any; a driver says `NVIDIA GeForce RTX 4090`."""
        known = [*known]
        parts = set(self.name.removeprefix("rtx").split("-"))
        named = [one for one in known if one.device == self.name]
        named += [one for one in known if self.type == "cuda" and _is_called(parts, one.device)]
        return replace(self, calibration=named[0]) if named else self


_EXTRA = {"nvidia", "geforce", "tesla", "rtx", "sxm", "hbm"}
"""Words of a driver's name that make it no other GPU; `ti`, `laptop`, `pcie`, `mig` do."""


def _words(name: str) -> set[str]:
    """Of a driver's name; `SXM4` and `HBM3` without their numbers."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return {re.sub(r"^(sxm|hbm)\d\w?$", r"\1", word) for word in words}


def _is_called(parts: set[str], driver: str) -> bool:
    """Whether a driver's name has these parts, and no word more that would make it another GPU."""
    said = _words(driver)
    return parts <= said and not {word for word in said - parts - _EXTRA if not re.fullmatch(r"\d+gb", word)}


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 15.0, 65, 320, bf16=False),
        Gpu("v100-32gb", 32.0, 125, 900, bf16=False),
        Gpu("rtx3090", 24.0, 71, 936),
        Gpu("rtx4090", 24.0, 165, 1008),
        Gpu("a10", 22.5, 125, 600),
        Gpu("l4", 22.5, 121, 300),
        Gpu("a6000", 48.0, 155, 768),
        Gpu("l40s", 45.0, 362, 864),
        Gpu("a100-40gb", 40.0, 312, 1555),
        Gpu("a100-80gb", 80.0, 312, 2039),
        Gpu("h100", 79.6, 989, 3350),
        Gpu("h200", 140.4, 989, 4800),
    )
}


def find(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ConfigError: it is not known.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: not known{did_you_mean(name, GPUS)} Known: {', '.join(GPUS)}; or give --vram")
    return GPUS[name]


def this_cpu() -> Gpu:
    """This machine's CPU, whose memory is the machine's."""
    return Gpu(cpu_name(), round(psutil.virtual_memory().total / GIB, 1), bf16=False, type="cpu")


def here(config: Config, vram: float | None) -> Gpu:
    """What a run will be on: a GPU of `vram` GiB, or what is here. Touches a GPU that is.

    Raises:
        ConfigError: the device that `config` asks for is not here.
    """
    if vram is not None and config.device != "cpu":
        return Gpu("GPU", vram)
    found = detect(config.device, bitsandbytes=config.quantization.bitsandbytes)
    if found.type == "cpu":
        return this_cpu()
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / GIB if found.type == "cuda" else 0.0
    return Gpu(found.name, round(memory, 1), bf16=found.bf16, type=found.type)
