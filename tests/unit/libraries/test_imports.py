"""`import_quickly` leaves libraries as `import` does, but for work that nothing needed."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

from qlora_exp.libraries import imports

CHECK = """
import importlib.metadata, inspect, sys
before = inspect.getframeinfo, importlib.metadata.packages_distributions
from qlora_exp.libraries.imports import import_quickly
import_quickly()
assert before == (inspect.getframeinfo, importlib.metadata.packages_distributions)
for name in ("torch._inductor.compile_fx", "scipy.optimize"):
    assert name not in sys.modules, f"{name} is imported: what does it?"

import torch
assert torch.compile.__module__ == "torch"
(place,) = [kernel.source for name, entry in torch._library.simple_registry.singleton._data.items()
            if name == "bitsandbytes::quantize_4bit" and (kernel := entry.fake_impl.kernel)]
file, line = place.rsplit(":", 1)
assert file.endswith("bitsandbytes/_ops.py") and int(line) > 1

from transformers import LlamaForCausalLM, utils  # found by what was read once
assert utils.import_utils.create_import_structure_from_path.__name__ == "create_import_structure_from_path"
assert utils.is_scipy_available() == (importlib.util.find_spec("scipy") is not None)

from trl import import_utils
ours, real = import_utils.PACKAGE_DISTRIBUTION_MAPPING, importlib.metadata.packages_distributions()
for package in ("trl", "torch", "yaml", "PIL", "bitsandbytes", "hydra"):
    assert ours[package] and {*map(str.lower, ours[package])} <= {*map(str.lower, real[package])}, package
    assert ours.get(package) == ours[package] and package in ours
assert ours.get("no_such_package", []) == [] and "no_such_package" not in ours
try:
    raise SystemExit(ours["no_such_package"])
except KeyError:
    pass

from bitsandbytes.backends.default import ops
assert ops._dequantize_blockwise_compute.__name__ == "_dequantize_blockwise_compute"
compiled = []
torch.compile = lambda model, **settings: compiled.append(settings) or model
from qlora_exp.libraries import imports
later = imports._compile_when_called(torch.compile, dynamic=False)(lambda value: value + 1)
assert not compiled and later(1) == 2 and later(2) == 3 and compiled == [{"dynamic": False}]
"""


def test_libraries_are_as_imported_without_what_nothing_needs():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]


def test_every_distribution_of_attention_kernels_is_found(monkeypatch):
    real = {"flash_attn": ["flash-attn", "flash-attn-4"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: real)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(name=name))
    found = imports._Distributions()
    assert found.get("flash_attn", []) == ["flash-attn", "flash-attn-4"]
    assert found.get("trl") == ["trl"]
