import subprocess
import sys

import pytest

import qlora_exp


def test_api_exports_are_callable():
    for _ in range(2):  # importing a submodule must not put it in a function's place
        assert all(callable(getattr(qlora_exp, name)) for name in qlora_exp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora_exp.nothing


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, qlora_exp; print(len({'torch', 'hydra', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
