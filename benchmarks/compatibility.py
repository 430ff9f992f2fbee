"""Try every method and variant of LoRA on every kind of base; write the verdicts and the table that the docs show.

    nox -s compatibility                   # all of them (about a quarter of an hour)
    nox -s compatibility -- lora ia3       # these only; verdicts of others stay

Prints what changed against the verdicts that were kept.
"""

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from qlora_exp.config.compatibility import ASPECTS, BASES, FILE, WORKS
from qlora_exp.studies.probe import kinds, name_of
from qlora_exp.utils.quiet import quiet

TABLE = Path(__file__).parent.parent / "docs" / "compatibility.md"
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "torchao", "optimum-quanto")
HEADINGS = {
    "gradient_checkpointing": "gradient checkpointing",
    "packing": "packing",
    "load_best_model_at_end": "best model at end",
    "resume": "resume",
    "merge": "merge",
}
INTRODUCTION = """\
# What works together

Every method and variant of LoRA that has a file in `conf/`, tried on a tiny model by `nox -s compatibility`
({libraries}). Do not edit: that command writes this page and `qlora_exp/config/compatibility.json`, by
which a run that would fail is refused before it starts. `tests/unit/studies/test_probe.py` tries some again. Nothing
here was run on a GPU.

**works**: trained for a few steps under the trainer, only what the method adds has changed; on a quantized base its
gradients are those on an unquantized base of the same values (cosine above 0.999); saved and loaded again it gives the
same logits. 4bit was tried as NF4 with double quantization (FP4 and single quantization take the same path), torchao as
int8, quanto as int4.

- gradient checkpointing: the same losses as without.
- packing: rows in one sequence are computed as they are apart (the model must isolate them too).
- best model at end: a checkpoint that is put back is the model that was measured there.
- resume: the same losses as uninterrupted. A run that cannot be resumed starts over.
- merge: without the adapter, its weights in the base's, the logits are the same. Into a quantized base that can be so
  only within its rounding, so the column is that of an unquantized one.

"""


def judge(words: tuple[str, ...], base: str) -> dict[str, str]:
    """Try one in this process, which is its own."""
    quiet()
    from transformers.utils import logging

    from qlora_exp.studies import probe

    logging.disable_progress_bar()
    return probe.verdicts(words, base)


def table(verdicts: dict[str, dict[str, dict[str, str]]], libraries: dict[str, str]) -> str:
    """Write the page."""
    lines = [["method", *BASES, *HEADINGS.values()], ["---"] * (1 + len(BASES) + len(HEADINGS))]
    reasons = []
    for kind, words in kinds().items():
        found = verdicts.get(kind, {})
        trains = {base: found.get(base, {}).get("trains", "unknown") for base in BASES}
        cells = [_cell(verdict) for verdict in trains.values()]
        reasons += [
            (name_of(words), base, verdict, "training")
            for base, verdict in trains.items()
            if _cell(verdict) == "refused"
        ]
        able = [base for base in BASES if trains[base] == WORKS]
        for aspect in HEADINGS:
            bases = [base for base in able if aspect != "merge" or base == "plain"]
            failing = [base for base in bases if found[base].get(aspect) != WORKS]
            cells.append(
                "-"
                if not bases
                else "works"
                if not failing
                else "refused"
                if failing == bases
                else "not " + ", ".join(failing)
            )
            reasons += [(name_of(words), base, found[base][aspect], HEADINGS[aspect]) for base in failing]
        lines.append([name_of(words), *cells])
    text = INTRODUCTION.format(libraries=", ".join(f"{name} {number}" for name, number in sorted(libraries.items())))
    text += "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text += "\n\n## Why refused\n\n| method | what | on | what happened |\n| --- | --- | --- | --- |\n"
    alike: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for name, base, why, what in reasons:  # the same but for numbers
        told = re.sub("|".join((r"[\d.]+", *BASES.values())), "", why)
        alike.setdefault((name, what, told), []).append((base, why))
    for (name, what, _), cases in alike.items():
        text += f"| {name} | {what} | {', '.join(base for base, _ in cases)} | {cases[0][1].replace('|', '/')} |\n"
    return text


def _cell(verdict: str) -> str:
    return verdict if verdict in (WORKS, "unknown") else "refused"


def main() -> None:
    """Try, print, write."""
    every = kinds()
    names = sorted(map(name_of, every.values()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(names)}")
    parser.add_argument("--bases", nargs="+", choices=[*BASES], default=[*BASES], help="verdicts of others stay")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    if unknown := {*options.methods} - {*names}:
        parser.error(f"no method {', '.join(sorted(unknown))}")
    wanted = {kind: words for kind, words in every.items() if not options.methods or name_of(words) in options.methods}
    kept = json.loads(FILE.read_text("utf-8"))["verdicts"] if FILE.is_file() else {}
    jobs = [(kind, words, base) for kind, words in wanted.items() for base in options.bases]
    found = {kind: dict(bases) for kind, bases in kept.items() if kind in every}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = pool.map(judge, *zip(*((words, base) for _, words, base in jobs), strict=True))
        for (kind, _, base), verdicts in zip(jobs, results, strict=True):
            before = kept.get(kind, {}).get(base)
            print(kind, base, verdicts if verdicts != before else "as before", flush=True)
            found.setdefault(kind, {})[base] = verdicts
    if options.check:
        return
    libraries = {name: version(name).split("+")[0] for name in LIBRARIES}
    FILE.write_text(json.dumps({"libraries": libraries, "verdicts": found}, indent=1, sort_keys=True) + "\n", "utf-8")
    TABLE.write_text(table(found, libraries), "utf-8")
    print(f"wrote {FILE} and {TABLE}; {len(ASPECTS)} aspects of {len(jobs)} combinations")


if __name__ == "__main__":
    main()
