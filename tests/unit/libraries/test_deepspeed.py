"""DeepSpeed takes the device that it is given, and compiles nothing."""

import os
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")
def test_deepspeed_computes_on_the_device_and_compiles_nothing(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    from qlora_exp.libraries.deepspeed import library

    deepspeed = library("cpu")
    assert deepspeed.__version__ == "0.19.8"
    assert deepspeed.accelerator.get_accelerator().device_name() == "cpu"
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None
