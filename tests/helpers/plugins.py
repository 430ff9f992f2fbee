"""Installed packages with metrics and losses of their own."""

from pathlib import Path
from typing import Any

METRICS = """
def shared_words(answers, references):
    pairs = [(set(a.split()), set(r.split())) for a, r in zip(answers, references)]
    return [len(a & r) / (len(a | r) or 1) for a, r in pairs]
shared_words.higher_is_better = True
shared_words.range = (0, 1)

def length(answers, references, prompts, rows):
    assert [row["completion"] for row in rows] and len(prompts) == len(rows)
    return [abs(len(a) - len(r)) for a, r in zip(answers, references)]
length.higher_is_better = False
length.unit = "characters"

calls = []
def away(answers, references):
    calls.append(1)
    if len(calls) > 1:
        raise ConnectionError("the judge\\nis away")
    return 1.0
away.higher_is_better = True
"""
LOSSES = """
def focal(log_probs):
    return -((1 - log_probs.exp()) ** 2) * log_probs
"""


def install(patch: Any, folder: Path, package: str, source: str, metrics: str = "", losses: str = "") -> None:
    """Put a package with a module of its name, and entry points `NAME = ATTRIBUTE`, on `sys.path`, as pip does.

    Args:
        patch: pytest's `monkeypatch`.
        folder: a folder, new for each package.
        package: its name.
        source: text of its module.
        metrics: names of its metrics, each that of a function too.
        losses: names of its losses.
    """
    info = folder / f"{package}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    groups = {"qlora_exp.metrics": metrics.split(), "qlora_exp.losses": losses.split()}
    lines = [line for group, names in groups.items()
             for line in (f"[{group}]", *(f"{name} = {package}:{name}" for name in names))]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / f"{package}.py").write_text(source)
    patch.syspath_prepend(folder)
