"""The scripts of benchmarks/, which are in no package."""

import importlib.util
from pathlib import Path
from typing import Any


def script(name: str) -> Any:
    """Import benchmarks/NAME.py."""
    file = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_script", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
