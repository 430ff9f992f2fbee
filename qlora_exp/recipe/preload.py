"""Import everything that jobs would import themselves, in the fork server, so that forked jobs start fast.

Only the fork server may import this module. It must run no kernel and touch no GPU; otherwise forking is not safe.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the sweep handles Ctrl-C, also during these imports

import contextlib
import gc
import importlib

from qlora_exp.environment import provenance
from qlora_exp.environment.device import nvml_handles, visible_gpus
from qlora_exp.libraries.imports import import_quickly
from qlora_exp.tracking import run_key
from qlora_exp.utils.quiet import quiet

_ALWAYS = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "evaluate",
    "rouge_score.rouge_scorer",
    "mlflow.store.tracking.sqlalchemy_store",
    "qlora_exp.data.rows",
    "qlora_exp.data.tokenization",
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
    # Its stages are imported when a run starts: jobs must not read other code than the run key stands for.
    "qlora_exp.recipe.measure",
    "qlora_exp.recipe.save",
    "qlora_exp.recipe.train",
    "qlora_exp.recipe.tune",
)


def _capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of this machine's NVIDIA GPUs; empty if they cannot be read.

    NVML reports them without initializing CUDA.
    """
    import pynvml

    from qlora_exp.libraries.torch import counts_gpus_without_cuda

    try:
        capabilities = [pynvml.nvmlDeviceGetCudaComputeCapability(handle) for handle in nvml_handles()]
    except pynvml.NVMLError:
        return []
    return capabilities if counts_gpus_without_cuda() else []


def _without_cuda(capabilities: list[tuple[int, int]]) -> contextlib.AbstractContextManager[None]:
    if not capabilities:
        return contextlib.nullcontext()
    from qlora_exp.libraries.torch import gpus_without_cuda

    return gpus_without_cuda(min(capabilities))


_GPUS = _capabilities() if visible_gpus() else []
_CODE_IS_LOADED = bool(_GPUS) or not visible_gpus()

quiet()
gc.disable()  # collecting would take a fifth of the import time for nothing; each job enables it again
with _without_cuda(_GPUS):
    if _CODE_IS_LOADED:
        import_quickly()
    for _name in (*_ALWAYS, *(_IF_UNTOUCHED if _CODE_IS_LOADED else ())):
        with contextlib.suppress(ImportError):  # a job that needs the package reports that it is missing
            importlib.import_module(_name)
if _CODE_IS_LOADED:  # jobs run the loaded code even if files change later, so compute its digest now
    run_key.code_digest()
provenance.environment()  # kept for each job's record
gc.freeze()  # what is imported is never garbage: collections in the jobs skip it
signal.signal(signal.SIGINT, signal.default_int_handler)  # for the jobs; the fork server itself still ignores Ctrl-C
