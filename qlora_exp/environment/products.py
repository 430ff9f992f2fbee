"""Choose the library that multiplies float32 matrices on a CPU.

Torch has two, Intel's MKL and oneDNN, and takes MKL, whose fastest kernels are for Intel's processors. A public
setting, `torch.set_float32_matmul_precision("medium")`, makes it take oneDNN, and lets that round to bfloat16 on
processors with instructions for it (AMX). So oneDNN is taken only where its products are as exact as MKL's. Then the
choice changes sums by their rounding alone, as another number of threads would.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora_exp.environment.device import cpu_name
from qlora_exp.utils import cache
from qlora_exp.utils.digests import json_digest

_FASTER = 1.2
"""How many times as fast oneDNN must be. On an AMD EPYC of 2024 it is 2.3 times, so that noise does not decide."""
_EXACT = 1e-5
"""Largest error of a product, relative to its largest element; float32 has 1e-6, bfloat16 2e-3."""
_ROUNDS = 8
_CHOICE = "products.json"


@contextmanager
def fast_products(device: str) -> Iterator[bool]:
    """Let torch multiply float32 matrices with the faster library within the context; give whether that is oneDNN.

    Does nothing for other devices than the CPU, or if the process has set a precision itself. What was measured is kept
    in the cache, so that all runs on a machine compute alike.
    """
    if device != "cpu" or _is_set() or not _prefers_onednn():
        yield False
        return
    with _onednn():
        yield True


def _prefers_onednn() -> bool:
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False

    def measure(folder: Path) -> None:
        (folder / _CHOICE).write_text(json.dumps({"onednn": _is_faster()}), "utf-8")

    depends_on = cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.__config__.show(), torch.get_num_threads()
    folder = cache.built(f"products-{json_digest(depends_on)}", measure)
    return bool(json.loads((folder / _CHOICE).read_text("utf-8"))["onednn"])


def _is_faster() -> bool:
    """Measure a product of a layer's size with both libraries alternately, for about a third of a second."""
    numbers = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 1024, generator=numbers), torch.randn(1024, 1024, generator=numbers))
    exact = a.double() @ b.double()

    def timed() -> tuple[float, torch.Tensor]:
        begin = time.perf_counter()
        product = a @ b
        return time.perf_counter() - begin, product

    usual, other = [], []
    for _ in range(_ROUNDS):
        usual.append(timed()[0])
        with _onednn():
            seconds, product = timed()
        other.append(seconds)
        if (product.double() - exact).abs().max() > _EXACT * exact.abs().max():
            return False
    return min(usual) > _FASTER * min(other)


def _is_set() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by torch's newer settings, which this function does not know
        return True


@contextmanager
def _onednn() -> Iterator[None]:
    backends = torch.backends.mkldnn, torch.backends.cuda
    before = [backend.matmul.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(backends, before, strict=True):
            backend.matmul.fp32_precision = precision
