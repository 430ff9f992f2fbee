"""What the process that jobs are forked from imports, by importing this: everything that they would import themselves.

It runs no kernel and touches no GPU, or forking it would not be safe. Nothing else may import this module.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to heed, also while this is imported

import contextlib
import gc
import importlib

from qlora_exp.environment.device import nvml_handles
from qlora_exp.sweeps.launchers.local import visible_gpus
from qlora_exp.tracking import run_key
from qlora_exp.utils.quiet import quiet

_ALWAYS = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "evaluate",
    "rouge_score.rouge_scorer",
    "mlflow.store.tracking.sqlalchemy_store",
    "qlora_exp.data.dataset",
    "qlora_exp.tracking.lifecycle",
    "qlora_exp.recipe.summary",
)
_IF_UNTOUCHED = (
    "qlora_exp.models.base",
    "qlora_exp.models.adapters",
    "qlora_exp.training.trainer",
    "qlora_exp.training.evaluation",
    "qlora_exp.planning.planner",
    "qlora_exp.recipe.finetune",
)


def _capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the NVIDIA GPUs that are here, as NVML tells them, which begins no CUDA; empty if not."""
    import pynvml

    from qlora_exp.libraries.torch import counts_gpus_without_cuda

    try:
        found = [pynvml.nvmlDeviceGetCudaComputeCapability(handle) for handle in nvml_handles()]
    except pynvml.NVMLError:
        return []
    return found if counts_gpus_without_cuda() else []


def _without_cuda(capabilities: list[tuple[int, int]]) -> contextlib.AbstractContextManager[None]:
    if not capabilities:
        return contextlib.nullcontext()
    from qlora_exp.libraries.torch import gpus_without_cuda

    return gpus_without_cuda(min(capabilities))


_GPUS = _capabilities() if visible_gpus() else []
_CODE_IS_LOADED = bool(_GPUS) or not visible_gpus()

quiet()
gc.disable()  # a fifth of the imports' time, for nothing; a job turns it on
with _without_cuda(_GPUS):
    for _name in (*_ALWAYS, *(_IF_UNTOUCHED if _CODE_IS_LOADED else ())):
        with contextlib.suppress(ImportError):  # a job that needs it says so
            importlib.import_module(_name)
if _CODE_IS_LOADED:  # jobs run this code, whatever becomes of the files meanwhile, and are to say so
    run_key.code()
signal.signal(signal.SIGINT, signal.default_int_handler)  # of the jobs; the fork server itself goes on to ignore it
