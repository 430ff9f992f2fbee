"""List GPUs with the manufacturers' figures for memory, arithmetic and bandwidth, and attach calibrations to them.

Sources: NVIDIA's data sheets and architecture papers; memory as the driver reports it. None of these figures was
measured by this project.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qlora_exp.config.schema import Config
from qlora_exp.environment.device import Device, cpu_name, detect, own_nvml_handle
from qlora_exp.environment.memory import capacity
from qlora_exp.planning.calibration import Calibration
from qlora_exp.utils.errors import ConfigError, did_you_mean
from qlora_exp.utils.units import GIB

DRIVER_GIB = 0.6
"""Memory that the driver's context and the libraries' workspaces take on each GPU: an allowance, not a measurement."""
NCCL_GIB = 0.4
"""Memory that NCCL takes besides on each of several GPUs: an allowance. It depends on channels and links.

Source: NVIDIA/nccl issue 1685 on GitHub, 1.06 GB outside torch's allocator on each of 8 H100 with the driver's context.
"""

EFFICIENCY = 0.7
"""Share of the manufacturer's rates, of arithmetic and of memory, at which an operation is assumed to run.

Source: `benchmarks/published_times.py`: with it, steps of five published runs on an A100 are planned within 6 %.
"""

PYTHON_SECONDS = 40e-6
"""Time in which Python starts an operation of a GPU, which a step of few tokens waits for.

Source: docs/explanation/planning_accuracy.md, "An H100": a step of 10,781 operations took 0.43 s with one row.
"""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, or this machine's CPU."""

    name: str
    memory_gib: float
    tflops: float = 0.0
    """Rate of dense matrix products in 16 bits with float32 accumulation; 0: unknown."""
    gb_per_s: float = 0.0
    """Memory bandwidth; 0: unknown."""
    link_gb_per_s: float = 0.0
    """Rate of sending to the other GPUs of a machine: NVLink where all have it, else PCIe; 0: unknown."""
    bf16: bool = True
    type: str = "cuda"
    calibration: Calibration | None = None
    limited_by: str = ""
    """What lets a process take less than the machine's memory, on a CPU."""

    @property
    def where(self) -> str:
        """Its memory and its name."""
        return f"{self.memory_gib:g} GiB ({self.name}{self.limited_by and f', as {self.limited_by} allows'})"

    @property
    def device(self) -> Device:
        """The device that a run on this GPU would detect."""
        return Device(self.type, self.name, bf16=self.bf16, paging=self.type == "cuda")

    @property
    def rates(self) -> str:
        """Description of the rates that step times are computed with."""
        if self.calibration and self.calibration.flops_per_second:
            return f"the median rate of {self.calibration.runs} runs on it"
        return f"{EFFICIENCY:g} of the manufacturer's rates and {PYTHON_SECONDS * 1e6:.0f} µs an operation"

    def calibrated(self, calibrations: Iterable[Calibration]) -> "Gpu":
        """Return this GPU with the calibration of its kind, if there is one.

        Calibrations carry the driver's name of the device, for example `NVIDIA GeForce RTX 4090`.
        """
        calibrations = [*calibrations]
        parts = _parts(self.name)
        matching = [fit for fit in calibrations if fit.device == self.name]
        matching += [fit for fit in calibrations if self.type == "cuda" and _matches_name(parts, fit.device)]
        return replace(self, calibration=matching[0]) if matching else self


_EXTRA = {"nvidia", "geforce", "tesla", "rtx", "sxm", "hbm", "generation", "blackwell", "workstation", "edition"}
"""Words in a driver's name that do not denote another GPU; `ti`, `super`, `laptop`, `pcie` and `mig` do."""


def _parts(name: str) -> set[str]:
    """Return the words that a driver's name has if it means this GPU: those of `rtx4070ti` are `4070` and `ti`."""
    return set(re.sub(r"(?<=\d)ti$", "-ti", name.removeprefix("rtx").removeprefix("-")).split("-"))


def _words(name: str) -> set[str]:
    """Split a driver's name into words; `SXM4` and `HBM3` lose their numbers."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return {re.sub(r"^(sxm|hbm)\d\w?$", r"\1", word) for word in words}


def _matches_name(parts: set[str], driver: str) -> bool:
    """Check that a driver's name has these parts, and no other word that denotes another GPU."""
    words = _words(driver)
    return parts <= words and not {word for word in words - parts - _EXTRA if not re.fullmatch(r"\d+gb", word)}


GPUS = {
    gpu.name: gpu
    for gpu in (
        # GeForce: tensor cores' rate with float32 accumulation is half of the advertised one. Turing, Ampere GA102, Ada
        # and RTX Blackwell architecture papers (appendices with a table of each card), PCIe one direction.
        Gpu("rtx2080ti", 11.0, 53.8, 616, 16, bf16=False),
        Gpu("rtx3060", 12.0, 25.5, 360, 32),
        Gpu("rtx3070", 8.0, 40.6, 448, 32),
        Gpu("rtx3080", 10.0, 59.5, 760, 32),
        Gpu("rtx3090", 24.0, 71, 936, 32),
        Gpu("rtx4060", 8.0, 30.2, 272, 16),
        Gpu("rtx4060ti", 8.0, 44.1, 288, 16),
        Gpu("rtx4070ti", 12.0, 80.2, 504, 32),
        Gpu("rtx4080", 16.0, 97.5, 717, 32),
        Gpu("rtx4090", 24.0, 165, 1008, 32),
        Gpu("rtx5070", 11.9, 61.7, 672, 64),
        Gpu("rtx5070ti", 15.9, 87.9, 896, 64),
        Gpu("rtx5080", 15.9, 112.6, 960, 64),
        Gpu("rtx5090", 31.8, 209.5, 1792, 64),
        # Workstations: data sheets of the RTX A6000 and of the RTX 6000 Ada; RTX Blackwell PRO architecture paper.
        Gpu("a6000", 48.0, 155, 768, 32),
        Gpu("rtx6000-ada", 48.0, 364, 960, 32),
        Gpu("rtx-pro-6000", 95.6, 503.8, 1792, 64),
        # Data centres: data sheets, dense rates (half of those "with sparsity"), memory with ECC on.
        Gpu("t4", 15.0, 65, 320, 16, bf16=False),
        Gpu("v100-32gb", 32.0, 125, 900, 150, bf16=False),
        Gpu("a10", 22.5, 125, 600, 32),
        Gpu("a40", 45.0, 149.7, 696, 32),
        Gpu("l4", 22.5, 121, 300, 32),
        Gpu("l40", 45.0, 181, 864, 32),
        Gpu("l40s", 45.0, 362, 864, 32),
        Gpu("a100-40gb", 40.0, 312, 1555, 300),
        Gpu("a100-80gb", 80.0, 312, 2039, 300),
        Gpu("h100-pcie", 79.6, 756, 2000, 64),
        Gpu("h100", 79.6, 989, 3350, 450),
        Gpu("h200", 140.4, 989, 4800, 450),
        Gpu("b200", 179.1, 2250, 7700, 900),
    )
}
"""Cards by the names that `--gpu` takes. Cards of other makers are not listed: no plan of one was ever compared."""


def find(name: str) -> Gpu:
    """Return the GPU called `name` in GPUS.

    Raises:
        ConfigError: GPUS does not list it.
    """
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name}: not listed{did_you_mean(name, GPUS)} Choose from {', '.join(GPUS)}; or give --vram"
        )
    return GPUS[name]


def find_all(names: str) -> list[Gpu]:
    """Return the GPUs called by `names`, which commas separate, in that order.

    Raises:
        ConfigError: GPUS does not list one, or one is named twice.
    """
    words = [name.strip() for name in names.split(",")]
    if twice := sorted({name for name in words if words.count(name) > 1}):
        raise ConfigError(f"--gpu: {', '.join(twice)} is named twice")
    return [find(name) for name in words]


def this_cpu() -> Gpu:
    """Return this machine's CPU, with the memory that a run can take there."""
    memory, by = capacity()
    return Gpu(cpu_name(), round(memory / GIB, 2), bf16=False, type="cpu", limited_by=by)


def of_this_machine() -> Gpu | None:
    """Return the GPU that a run here would take, as NVIDIA's driver describes it, without torch; None if there is none.

    Rates are those of GPUS, if it lists the card.
    """
    if (handle := own_nvml_handle()) is None:
        return None
    import pynvml

    name = str(pynvml.nvmlDeviceGetName(handle))
    memory = round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB, 1)
    listed = next((gpu for gpu in GPUS.values() if _matches_name(_parts(gpu.name), name)), None)
    major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return replace(listed or Gpu("", 0.0, bf16=major >= 8), name=name, memory_gib=memory)


def here(config: Config, vram: float | None) -> Gpu:
    """Return the device of a run: a GPU of `vram` GiB if given, else the device of this machine.

    Initializes a GPU that is present.

    Raises:
        ConfigError: this machine does not have the device that `config` asks for.
    """
    if vram is not None and config.device != "cpu":
        return Gpu("GPU", vram)
    detected = detect(config.device, bitsandbytes=config.quantization.bitsandbytes)
    if detected.type == "cpu":
        return this_cpu()
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / GIB if detected.type == "cuda" else 0.0
    return Gpu(detected.name, round(memory, 1), bf16=detected.bf16, type=detected.type)
