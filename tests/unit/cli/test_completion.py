import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete", reason="pip install -e '.[completion]'")


def answer(line: str, out: Path, code: str = "") -> list[str]:
    """Ask as bash does: the line is in the environment; the answer goes to a file."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_COMP_WORDBREAKS": " \"'><=;|&(:", "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_SHELL": "bash"}
    code = f"{code}\nfrom qlora_exp.cli.main import main\nmain()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ) | asked, capture_output=True, text=True, check=False
    )
    assert out.is_file(), result.stderr
    return out.read_text("utf-8").split("\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qlora-exp quant", ["quantize-error "]),
        ("qlora-exp plan --pri", ["--price "]),
        ("qlora-exp train -m seed=1 method=lor", ["lora "]),  # bash has split the word at "="
        ("qlora-exp plan method.use_rs", ["method.use_rslora="]),
        ("qlora-exp keys training.learning", ["training.learning_rate "]),
        ("qlora-exp keys tracking=lo", ["local "]),
    ],
)
def test_a_line_is_completed(line: str, words: list[str], tmp_path: Path):
    assert answer(line, tmp_path / "out") == words


def test_completion_imports_nothing_heavy(tmp_path: Path):
    refuse = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        assert name not in ('torch', 'transformers', 'peft', 'mlflow', 'hydra', 'datasets'), name\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    assert "method=" in " ".join(answer("qlora-exp train metho", tmp_path / "out", refuse))
