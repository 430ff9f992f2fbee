import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import take_interrupts

from qlora_exp import recipe

pytestmark = pytest.mark.slow

LOADED = """
print('begun', flush=True)
import signal, sys, qlora_exp.sweeps.launchers.preload, torch
print(*sys.modules, torch.cuda.is_initialized(), signal.getsignal(signal.SIGINT).__name__)
"""


@pytest.mark.parametrize(("gpus", "loaded"), [("", True), ("0", False)])
def test_preloading_ignores_ctrl_c_and_skips_modules_that_touch_a_present_gpu(gpus: str, loaded: bool, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    process = subprocess.Popen(
        [sys.executable, "-c", LOADED], stdout=subprocess.PIPE, text=True, preexec_fn=take_interrupts
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)  # it loads libraries for seconds
    process.send_signal(signal.SIGINT)
    *modules, initialized, handler = process.stdout.read().split()
    assert process.wait() == 0
    assert {"datasets", "evaluate", "mlflow", "transformers.models.llama.modeling_llama"} <= set(modules)
    assert ("qlora_exp.training.trainer" in modules) is loaded
    stages = {f"qlora_exp.recipe.{file.stem}" for file in Path(recipe.__file__).parent.glob("[!_]*.py")}
    assert (stages <= set(modules)) is loaded
    assert ("bitsandbytes" in modules) is loaded
    assert initialized == "False"
    assert handler == "default_int_handler"  # of the jobs
