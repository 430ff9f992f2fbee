"""The script that writes what the installed libraries declare."""

import importlib.util
from pathlib import Path
from typing import Any


def generator() -> Any:
    """Import benchmarks/library_settings.py, which is in no package."""
    file = Path(__file__).parents[2] / "benchmarks" / "library_settings.py"
    spec = importlib.util.spec_from_file_location("library_settings_generator", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
