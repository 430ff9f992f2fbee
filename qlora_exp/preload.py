"""What the process that jobs are forked from imports, by importing this: everything that they would import themselves.

It runs no kernel and touches no GPU, or forking it would not be safe. Nothing else may import this module.
"""

import contextlib
import gc
import importlib

from qlora_exp import identity
from qlora_exp.launcher import visible_gpus
from qlora_exp.quiet import quiet

_ALWAYS = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "evaluate",
    "rouge_score.rouge_scorer",
    "mlflow.store.tracking.sqlalchemy_store",
    "qlora_exp.data",
    "qlora_exp.tracking",
    "qlora_exp.summary",
)
# bitsandbytes, which PEFT and TRL import, asks a GPU for its capability at import, and after that no fork may use it.
_WITHOUT_GPU = (
    "qlora_exp.model",
    "qlora_exp.adapters",
    "qlora_exp.training",
    "qlora_exp.evaluation",
    "qlora_exp.plan",
    "qlora_exp.run",
)

_CODE_IS_LOADED = not visible_gpus()

quiet()
gc.disable()  # a fifth of the imports' time, for nothing; a job turns it on
for _name in (*_ALWAYS, *(_WITHOUT_GPU if _CODE_IS_LOADED else ())):
    with contextlib.suppress(ImportError):  # a job that needs it says so
        importlib.import_module(_name)
if _CODE_IS_LOADED:  # jobs run this code, whatever becomes of the files meanwhile, and are to say so
    identity.code()
