import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import take_interrupts

from qlora_exp import recipe

pytestmark = pytest.mark.slow

LOADING = """
import importlib, os, signal, sys
for gpus in ("0", ""):  # reloading saves seconds: most is loaded in both cases
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    print(gpus, flush=True)
    if gpus:
        import qlora_exp.recipe.preload as preload, torch
    else:
        importlib.reload(preload)
    print(*sys.modules, torch.cuda.is_initialized(), signal.getsignal(signal.SIGINT).__name__, flush=True)
"""


def test_preloading_ignores_ctrl_c_and_skips_modules_that_touch_a_present_gpu():
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, text=True, preexec_fn=take_interrupts
    )
    assert process.stdout is not None
    for gpus, loaded in (("0", False), ("", True)):
        assert process.stdout.readline().strip() == gpus
        time.sleep(0.5)  # it loads libraries for seconds
        process.send_signal(signal.SIGINT)
        *modules, initialized, handler = process.stdout.readline().split()
        assert {"datasets", "evaluate", "mlflow", "transformers.models.llama.modeling_llama"} <= set(modules)
        assert ("qlora_exp.training.trainer" in modules) is loaded
        stages = {f"qlora_exp.recipe.{file.stem}" for file in Path(recipe.__file__).parent.glob("[!_]*.py")}
        assert (stages <= set(modules)) is loaded
        assert ("bitsandbytes" in modules) is loaded
        assert initialized == "False"
        assert handler == "default_int_handler"  # of the jobs
    assert process.wait() == 0
