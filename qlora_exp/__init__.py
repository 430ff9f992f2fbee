"""Run experiments in efficient fine-tuning, composed with Hydra, trained with TRL, and tracked in MLflow.

The Python API is `compose`, `train`, `sweep`, `runs`, `curves`, `compare` and `load`; `quiet`, called
first, hides messages of libraries. Each name is imported when it is first used, because importing torch takes seconds.
"""

import importlib
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.config.schema import Config
    from qlora_exp.deploy.load import load
    from qlora_exp.recipe.finetune import run as train
    from qlora_exp.recipe.result import RunResult
    from qlora_exp.results.frame import compare, curves, runs
    from qlora_exp.sweeps.from_python import sweep
    from qlora_exp.utils.quiet import quiet

__version__ = version("qlora-exp")
__all__ = ["Config", "RunResult", "compare", "compose", "curves", "load", "quiet", "runs", "sweep", "train"]

# No usage data is sent to anyone unless the user asks for it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_HOME = {
    "Config": ("config.schema", "Config"),
    "RunResult": ("recipe.result", "RunResult"),
    "compare": ("results.frame", "compare"),
    "compose": ("config.hydra_compose", "compose"),
    "curves": ("results.frame", "curves"),
    "load": ("deploy.load", "load"),
    "quiet": ("utils.quiet", "quiet"),
    "runs": ("results.frame", "runs"),
    "sweep": ("sweeps.from_python", "sweep"),
    "train": ("recipe.finetune", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlora_exp' has no attribute '{name}'")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(f"qlora_exp.{module}"), attribute)
