"""Check torch, the GPUs and bitsandbytes; `doctor` runs this as a process and reads a line of JSON for each finding."""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from qlora_exp.environment.device import nvml_handles
from qlora_exp.studies.doctor import Finding, is_installed
from qlora_exp.utils.errors import type_and_first_line
from qlora_exp.utils.units import GIB

_TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}
"""Largest difference between a 4-bit product and the product with the dequantized weights, of the latter's norm."""


def findings() -> Iterator[Finding]:
    """Yield what torch, each GPU and bitsandbytes show."""
    handles = nvml_handles()
    yield from _driver(handles)
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    yield Finding("torch", "ok", f"{torch.__version__}, built for {built}, {torch.get_num_threads()} threads")
    yield from _gpus(torch, len(handles))
    yield from _four_bits(torch)
    yield from _attention(torch)


def _driver(handles: list[Any]) -> Iterator[Finding]:
    if not handles:
        return
    import pynvml

    highest = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    what = f"{pynvml.nvmlSystemGetDriverVersion()}, for CUDA up to {highest // 1000}.{highest % 1000 // 10}"
    yield Finding("NVIDIA driver", "ok", what)


def _gpus(torch: Any, by_driver: int) -> Iterator[Finding]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    why = " ".join(str(warning.message).splitlines()[0] for warning in warned)
    if not available and torch.backends.mps.is_available():
        yield Finding("GPU", "ok", "Apple GPU (mps); 4 and 8 bits of bitsandbytes run on the CPU")
    elif not available and by_driver:
        if torch.version.cuda is None:
            remedy = "install torch's build for CUDA: pip install --force-reinstall torch"
            yield Finding("GPU", "problem", f"{by_driver} NVIDIA GPUs, but torch is built for CPUs only", remedy)
        elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield Finding("GPU", "warning", "CUDA_VISIBLE_DEVICES hides all GPUs", "unset it")
        else:
            remedy = f"update the driver, or install a torch for an older CUDA than {torch.version.cuda}"
            what = f"torch cannot use the {by_driver} NVIDIA GPUs: {why or 'it gives no reason'}"
            yield Finding("GPU", "problem", what, remedy)
    elif not available:
        yield Finding("GPU", "note", "none: runs take the CPU, for models of up to about a billion parameters")
    for index in range(torch.cuda.device_count() if available else 0):
        yield _gpu(torch, index)


def _gpu(torch: Any, index: int) -> Finding:
    try:
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
    except RuntimeError as error:
        return Finding(f"GPU {index}", "problem", f"cannot be used: {type_and_first_line(error)}", "see nvidia-smi")
    native = major >= 8
    what = (
        f"{torch.cuda.get_device_name(index)}: {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability "
        f"{major}.{minor}, {'bfloat16' if native else 'no bfloat16: runs compute in float16'}"
    )
    busy = free < 0.5 * total
    remedy = "another program uses it (nvidia-smi); CUDA_VISIBLE_DEVICES chooses another GPU" if busy else ""
    return Finding(f"GPU {index}", "warning" if busy else "ok", what, remedy)


def _four_bits(torch: Any) -> Iterator[Finding]:
    """Multiply by 4-bit weights on each device, and compare with the dequantized weights' product."""
    try:
        import bitsandbytes

        from qlora_exp.libraries.bitsandbytes import dequantize_every_width
    except Exception as error:  # whatever its libraries raise
        remedy = "4- and 8-bit bases cannot be used; pip install --force-reinstall bitsandbytes"
        yield Finding("bitsandbytes", "problem", f"cannot be imported: {type_and_first_line(error)}", remedy)
        return
    dequantize_every_width()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        name = f"bitsandbytes on {device}"
        try:
            off = _error_of_product(torch, bitsandbytes, device)
        except Exception as error:
            remedy = "see `python -m bitsandbytes`; quantization=none and quanto_int4 do not need it"
            yield Finding(name, "problem", f"a product with 4-bit weights fails: {type_and_first_line(error)}", remedy)
            continue
        right = off <= _TOLERANCE[device.partition(":")[0]]
        verdict = f"{'right' if right else 'WRONG'} ({off:.1e} of its norm off)"
        what = f"{bitsandbytes.__version__}: a product with NF4 weights is {verdict}"
        yield Finding(name, "ok" if right else "problem", what, "" if right else "install another version of it")


def _error_of_product(torch: Any, bitsandbytes: Any, device: str) -> float:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(192, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(device)
    rows = torch.randn(8, 192, device=device)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    expected = rows @ weight.T
    return float((layer(rows) - expected).norm() / expected.norm())


def _attention(torch: Any) -> Iterator[Finding]:
    if is_installed("flash_attn"):
        try:
            import flash_attn

            yield Finding("flash-attn", "ok", str(flash_attn.__version__))
        except Exception as error:  # built for another torch or CUDA
            remedy = "install it again for this torch, or leave model.attn_implementation=sdpa"
            yield Finding("flash-attn", "warning", f"cannot be imported: {type_and_first_line(error)}", remedy)
    elif torch.cuda.is_available():
        what = "not installed: model.attn_implementation=flash_attention_2 needs it"
        yield Finding("flash-attn", "note", what, "the default, sdpa, has a flash kernel of its own")


def main() -> None:
    """Print each finding as a line of JSON."""
    for finding in findings():
        print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
