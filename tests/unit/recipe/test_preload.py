import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import processes
from support import take_interrupts

from qlora_exp import recipe

pytestmark = pytest.mark.slow

LOADING = """
import os, signal, sys
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
print("loading", flush=True)
import qlora_exp.recipe.preload, torch
print(*sys.modules, torch.cuda.is_initialized(), signal.getsignal(signal.SIGINT).__name__, flush=True)
"""


def test_preloading_ignores_ctrl_c_and_skips_modules_that_touch_a_present_gpu(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, text=True, preexec_fn=take_interrupts
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    time.sleep(0.5)  # it loads libraries for seconds
    process.send_signal(signal.SIGINT)
    check(process.stdout.readline(), is_code_loaded=False)
    assert process.wait() == 0
    job = processes.start(processes.write_modules, tmp_path / "modules")  # without a GPU, as all jobs of these tests
    job.join()
    check((tmp_path / "modules").read_text(), is_code_loaded=True)


def check(shown: str, is_code_loaded: bool) -> None:
    *modules, initialized, handler = shown.split()
    assert {"datasets", "evaluate", "mlflow", "transformers.models.llama.modeling_llama"} <= set(modules)
    assert ("qlora_exp.training.trainer" in modules) is is_code_loaded
    stages = {f"qlora_exp.recipe.{file.stem}" for file in Path(recipe.__file__).parent.glob("[!_]*.py")}
    assert (stages <= set(modules)) is is_code_loaded
    assert ("bitsandbytes" in modules) is is_code_loaded
    assert initialized == "False"
    assert handler == "default_int_handler"  # of the jobs
