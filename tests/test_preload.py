import subprocess
import sys

import pytest

LOADED = "import sys, qlora_exp.preload, torch; print(*sys.modules, torch.cuda.is_initialized())"


@pytest.mark.parametrize(("gpus", "loaded"), [("", True), ("0", False)])
def test_everything_is_loaded_but_what_touches_a_gpu_that_is_there(gpus: str, loaded: bool, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    result = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    *modules, initialized = result.stdout.split()
    assert {"datasets", "evaluate", "mlflow", "transformers.models.llama.modeling_llama"} <= set(modules)
    assert ("qlora_exp.training" in modules) is loaded
    assert ("bitsandbytes" in modules) is loaded
    assert initialized == "False"
