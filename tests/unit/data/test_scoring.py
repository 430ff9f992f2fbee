"""What a model answers may be code, and some scorers of reasoning-gym run it: it may do nothing but compute."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import REASONING_GYM, DatasetConfig
from qlora_exp.data import scoring
from qlora_exp.data.reading import sources

pytestmark = pytest.mark.skipif(not scoring.is_possible(), reason="needs seccomp")

TASKS = ("string_insertion", "simple_integration")
"""One that calls `eval`, and one that goes through sympy's `parse_expr`: no task has another way to run an answer."""
SHELL = "__import__('os').system('touch {0}')"
HOSTILE = [
    SHELL,
    "[" + SHELL + "]",
    "[open('{0}', 'w')]",
    "[__import__('pathlib').Path('{0}').touch()]",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', '{0}'])",
    "[__import__('ctypes').CDLL(None).creat(b'{0}', 511)]",
    "[__import__('os').fork()]",
    "[__import__('socket').socket()]",
    "[__import__('os').kill(__import__('os').getppid(), 9)]",
    "[__import__('signal').alarm(0)]",
    "lambda: " + SHELL,
    "(lambda: " + SHELL + ")()",
    "[exit()]",
    "exit()",
    "[__import__('os')._exit(0)]",
    "[0]*10**10",
    "(" * 5000 + "1" + ")" * 5000,
    "[" * 100000,
    "-" * 100000 + "1",
    "\ud800\0\n",
]
FOREVER = ["[9**9**9]", "9**9**9", "[x for x in iter(int, 1)]"]


@cache
def task(name: str) -> tuple[scoring.Scorer, dict[str, str]]:
    """Its scorer, and a row."""
    config = DatasetConfig(path=f"{REASONING_GYM}{name}", reasoning_gym_size=1)
    score = sources.scorer(config)
    assert score is not None
    (_, row), *_ = sources.read(config, config.path, "train").rows(["answer", "entry"])
    return score, row


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_code_in_an_answer_has_no_effect(name: str, tmp_path: Path, monkeypatch):
    score, row = task(name)
    canary, before = tmp_path / "canary", score.stopped
    with monkeypatch.context() as patched:
        for answer in (*HOSTILE, *FOREVER):
            patched.setattr(scoring, "SECONDS", 0.05 if answer in FOREVER else 0.3)
            assert score(answer.replace("{0}", str(canary)), row) <= 0.1, answer[:60]
    assert not canary.exists()
    assert score.stopped > before + 3
    assert score(row["answer"], row) == 1.0  # whatever was before


def test_answer_that_runs_a_shell_is_killed_by_seccomp(tmp_path: Path):
    """The attack of a bundle whose model answers with code: it is run, and killed at its first system call."""
    score, row = task("string_insertion")
    before = score.stopped
    assert score(f"[{SHELL.format(tmp_path / 'canary')}]", row) == 0.0
    assert score.stopped == before + 1
    assert not (tmp_path / "canary").exists()


def test_answer_cannot_change_the_score_of_another():
    score, row = task("string_insertion")
    cheat = "__import__('sys').modules['reasoning_gym.algorithmic.string_insertion'].StringInsertionDataset"
    score(f"[setattr({cheat}, 'score_answer', lambda *_: 1.0)]", row)
    assert score("wrong", row) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("written", [b"nan", b"7", b"-1", b"1" * 1000, b"\xff", b"no number", b""])
def test_forged_score_counts_as_zero(written: bytes):
    score, row = task("string_insertion")
    assert score(f"[__import__('os').write({scoring._PIPE}, {written!r}), __import__('os')._exit(0)]", row) == 0.0


@pytest.mark.slow
def test_scoring_process_has_no_secrets_survives_an_error_and_ends_with_its_scorer(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    score, row = task.__wrapped__("prime_factorization")
    assert score("no number", row) == 0.0
    assert "the scorer raised an error" in caplog.text
    assert score(row["answer"], row) == 1.0
    process = score._process
    assert process is not None
    assert "hf_secret" not in Path(f"/proc/{process.pid}/environ").read_text()
    del score
    assert process.poll() == 0


def test_unsupported_system_has_no_task_score(monkeypatch, caplog):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert sources.scorer(compose(["dataset=reasoning_gym"]).dataset) is None
    assert "no task_score" in caplog.text


@pytest.mark.slow
def test_isolated_scores_equal_direct_scores():
    """For right and wrong answers to every task, and what people write where sympy reads it."""
    script = """
import gc, json, warnings
from reasoning_gym.factory import DATASETS
from qlora_exp.data import scoring
warnings.simplefilter("ignore")
MATHS = ["1", "[1, 2]", "(3 + 4)*2", "x**3/3 + C", "exp(x)*sin(x) + log(x)", "Piecewise((x, x > 0), (0, True))"]
SMALL = {"quantum_lock": {"difficulty": 1}, "knight_swap": {"min_pieces": 1, "max_pieces": 1}}  # seconds otherwise
gc.disable()
differ, count = [], 0
for name in sorted({*DATASETS} - {"composite"}):  # which is made of others
    judge = scoring.prepared(name, SMALL.get(name, {}))
    scoring._LATE = ()  # imported with the first
    entry = next(iter(judge))
    own = str(entry["answer"])
    for answer in [own, "surely wrong", *(MATHS if "integration" in name or name == "countdown" else [])]:
        found, count = scoring.score_in_fork(judge, answer, entry, 10), count + 1
        try:
            right = {"score": float(judge.score_answer(answer, entry))}
        except ValueError:
            right = {"stopped": "the scorer raised an error"}
        if found != right:
            differ.append((name, answer, found, right))
print("\\n" + json.dumps([count, differ]))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    count, differ = json.loads(result.stdout.splitlines()[-1])
    assert differ == []
    assert count > 200
