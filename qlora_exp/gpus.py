"""What is known of GPUs: memory, arithmetic, bandwidth, as their makers publish them.

Sources: NVIDIA's data sheets and architecture papers; memory as the driver reports it. None of these was measured here.
"""

from dataclasses import dataclass

from qlora_exp.device import Device
from qlora_exp.errors import ConfigError, did_you_mean

DRIVER_GIB = 0.6
"""Taken on each GPU by the driver's context and the libraries' workspaces: an allowance, not a measurement."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: float
    tflops: float = 0.0
    """Dense matrix products in 16 bits, summed in float32; 0: not known."""
    gb_per_s: float = 0.0
    """Of its memory; 0: not known."""
    bf16: bool = True

    @property
    def device(self) -> Device:
        """What a run on it would detect."""
        return Device("cuda", self.name, bf16=self.bf16, paging=True)


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
