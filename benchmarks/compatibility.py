"""Test every method and variant of LoRA on every kind of base, with every engine, on every family of models.

    nox -s compatibility                         # all (most of an hour)
    nox -s compatibility -- lora ia3             # only these methods; results of others stay
    nox -s compatibility -- 'lora dora'          # a variant of LoRA: one word, in quotes
    nox -s compatibility -- --families gpt2      # only this family, no kinds of base, no engines
    nox -s compatibility -- --engines fsdp       # only this engine

Writes the results and the page.

Prints the results that differ from those in the file.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

from qlora_exp.config.tables.compatibility import (
    ASPECTS,
    BASES,
    DIFFERS,
    ENGINE_BASES,
    ENGINES,
    FILE,
    REFUSED,
    WORKS,
)
from qlora_exp.models.builtin import TINY
from qlora_exp.studies.probe import kinds, name_of
from qlora_exp.utils.errors import did_you_mean
from qlora_exp.utils.quiet import quiet

TABLE = Path(__file__).parent.parent / "docs" / "reference" / "compatibility.md"
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "torchao", "optimum-quanto")
HEADINGS = {
    "gradient_checkpointing": "gradient checkpointing",
    "packing": "packing",
    "load_best_model_at_end": "best model at end",
    "resume": "resume",
    "merge": "merge",
    "ddp": "ddp",
    "fsdp": "fsdp",
}
TESTED_ON = {"merge": ("plain",), **dict.fromkeys(ENGINES, ENGINE_BASES)}
"""Kinds of base on which an aspect was tested; the others on all."""
INTRODUCTION = """\
# What works together

Results of testing every method and every variant of LoRA with a file in `conf/` on a tiny model
({libraries}). Do not edit this page: `nox -s compatibility` writes it, together with
`qlora_exp/config/tables/compatibility.json`. With that file, a run that would fail is refused before it starts.
`tests/unit/studies/test_probe.py` repeats some of the tests. None of them ran on a GPU.

**works** means: after a few steps of training only the parameters of the method have changed; on a quantized base its
gradients equal those on an unquantized base with the same values (cosine above 0.999); after saving and loading, the
model gives the same logits. 4bit was tested as NF4 with double quantization (FP4 and single quantization use the same
code), torchao as int8, quanto as int4.

- gradient checkpointing: the losses are the same as without it.
- packing: rows packed into one sequence give the same logits as separate rows (the model must isolate them too).
- best model at end: a checkpoint that is loaded at the end gives the loss that was measured when it was saved.
- resume: the losses are the same as without an interruption. A run that cannot be resumed starts over.
- merge: the model gives the same logits after the adapter's weights are merged into the base. A merge into a quantized
  base is exact only up to rounding, so this column is for an unquantized base.
- ddp, fsdp: two processes of a CPU give the losses, norms of gradients and saved weights of one process with the batch
  of both (`distributed=ddp` or `fsdp`, on plain and 4bit bases). differs: they train, but a rule of the method's own
  depends on the process, as the next table says.

"""


FAMILIES = """
## Families of models

Every method and variant was also trained on a tiny random model of each of these families, with its settings in
`conf/` and without dropout: {families}. (QA-LoRA needs GPTQ files, so it was not; LoftQ was on a 4-bit base.) What is
not listed here works. All of it is refused before a run begins. Most often the reason is what the model has, so that it
is found in families that were not tested, too, and other settings may avoid it: `method.target_modules=attention` keeps
LoRA away from fused experts.

| family | does not train |
| --- | --- |
"""


Verdicts = dict[str, dict[str, dict[str, str]]]
"""By kind of method, kind of base, and aspect or engine."""


def judge(words: tuple[str, ...], base: str) -> dict[str, str]:
    """Test one method on one base, in a worker process."""
    quiet()
    from transformers.utils import logging

    from qlora_exp.studies import probe

    logging.disable_progress_bar()
    return probe.verdicts(words, base)


def judge_family(family: str, methods: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Test methods on one family of models, in a worker process; return the reasons of those that do not train it."""
    quiet()
    from transformers.utils import logging

    from qlora_exp.studies import probe

    logging.disable_progress_bar()
    verdicts = {kind: probe.family_verdict(words, family) for kind, words in methods.items()}
    return {kind: verdict for kind, verdict in verdicts.items() if verdict != WORKS}


def judge_engines(
    methods: dict[str, tuple[str, ...]], verdicts: Verdicts, engines: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Test engines, each run in two processes, with the methods that train on the bases; yield kind, base, verdicts."""
    if not engines:
        return
    quiet()
    import datasets
    from transformers.utils import logging

    from qlora_exp.studies.engines import engine_verdicts

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        for kind, words in methods.items():
            for base in ENGINE_BASES:
                if verdicts[kind][base]["trains"] == WORKS:
                    yield kind, base, engine_verdicts(words, base, Path(folder), engines)


def family_table(families: dict[str, dict[str, str]]) -> str:
    """Return the part of the page about families of models."""
    text = FAMILIES.format(families=", ".join(sorted(families)))
    names = {kind: name_of(words) for kind, words in kinds().items()}
    causes: dict[str, dict[str, list[str]]] = {}
    for family, verdicts in sorted(families.items()):
        text += f"| {family} | {', '.join(names[kind] for kind in sorted(verdicts)) or '-'} |\n"
        for kind, verdict in sorted(verdicts.items()):
            causes.setdefault(_alike(verdict), {}).setdefault(names[kind], []).append(family)
    text += "\n| why | methods and families |\n| --- | --- |\n"
    for why, methods in sorted(causes.items()):
        where = {tuple(sorted(on)): [] for on in methods.values()}  # type: dict[tuple[str, ...], list[str]]
        for name, on in methods.items():
            where[tuple(sorted(on))].append(name)
        cells = [f"{', '.join(sorted(group))} on {', '.join(on)}" for on, group in sorted(where.items())]
        text += f"| {why} | {'; '.join(cells)} |\n"
    return text


def _alike(verdict: str) -> str:
    """Return a reason without the names of methods, settings and layers, so that equal reasons are listed once."""
    why = verdict.removeprefix(REFUSED).replace("|", "/")
    for pattern, replacement in (
        (r"PEFT cannot adapt this model with PeftType\.\w+: ", ""),
        (
            r".*(type|module|a) (<class '[\w.]*\.)?(Conv1D|FalconLinear)\b.*",
            r"its layers are \3, which the method does not support",
        ),
        (r" of PeftType\.\w+ for a \w+ model", ""),
        (r"(Unsupported model type) for adaption prompt: .*", r"\1"),
        (r" \(model\.layers[\w.]*, \.\.\.\)", ""),
        (r"[\w=]+ does not work on them", "the variant does not work on them"),
        (r"lora_variant=\w+ needs", "the variant needs"),
    ):
        why = re.sub(pattern, replacement, why)
    return why


def table(verdicts: Verdicts, libraries: dict[str, str], families: dict[str, dict[str, str]]) -> str:
    """Return the text of the page."""
    lines = [["method", *BASES, *HEADINGS.values()], ["---"] * (1 + len(BASES) + len(HEADINGS))]
    reasons = []
    for kind, words in kinds().items():
        results = verdicts.get(kind, {})
        trains = {base: results.get(base, {}).get("trains", "unknown") for base in BASES}
        cells = [_cell(verdict) for verdict in trains.values()]
        reasons += [
            (name_of(words), base, verdict, "training")
            for base, verdict in trains.items()
            if _cell(verdict) == "refused"
        ]
        able = [base for base in BASES if trains[base] == WORKS]
        for aspect in HEADINGS:
            bases = [base for base in able if base in TESTED_ON.get(aspect, BASES)]
            found = {base: results[base].get(aspect, "unknown") for base in bases}
            cells.append(_summary({base: _cell(verdict) for base, verdict in found.items()}))
            reasons += [(name_of(words), base, why, HEADINGS[aspect]) for base, why in found.items() if why != WORKS]
        lines.append([name_of(words), *cells])
    text = INTRODUCTION.format(libraries=", ".join(f"{name} {number}" for name, number in sorted(libraries.items())))
    text += "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text += "\n\n## Why refused, or different\n\n| method | what | on | what happened |\n| --- | --- | --- | --- |\n"
    alike: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for name, base, why, what in reasons:  # reasons that differ only in numbers are listed once
        pattern = re.sub("|".join((r"[\d.]+", *BASES.values())), "", why)
        alike.setdefault((name, what, pattern), []).append((base, why))
    for (name, what, _), cases in alike.items():
        text += f"| {name} | {what} | {', '.join(base for base, _ in cases)} | {cases[0][1].replace('|', '/')} |\n"
    return text + family_table(families)


def _cell(verdict: str) -> str:
    if verdict in (WORKS, "unknown"):
        return verdict
    return "differs" if verdict.startswith(DIFFERS) else "refused"


def _summary(cells: dict[str, str]) -> str:
    """Return what to write of an aspect's results on several kinds of base."""
    words = {*cells.values()}
    if len(words) < 2:
        return words.pop() if words else "-"
    refused = [base for base, cell in cells.items() if cell == "refused"]
    return ", ".join([*sorted(words - {WORKS, "refused"}), *(["not " + ", ".join(refused)] if refused else [])])


def main() -> None:
    """Run the tests, print the changes, write the files."""
    methods = kinds()
    names = sorted(map(name_of, methods.values()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "methods",
        nargs="*",
        metavar="METHOD",
        help=f"methods to test, and variants of LoRA in quotes ('lora dora'); default: all of {', '.join(names)}",
    )
    parser.add_argument(
        "--bases", nargs="+", choices=[*BASES], help="kinds of base to test; no families unless they are named too"
    )
    parser.add_argument(
        "--families",
        nargs="*",
        choices=[*TINY],
        help="families of models to test (none named: all); no kinds of base unless they are named too",
    )
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, help="engines to test; no kinds of base, no families unless named too"
    )
    parser.add_argument("--check", action="store_true", help="only print the changes, write no file")
    options = parser.parse_args()
    if problem := unknown(options.methods, names) or missing_packages():
        parser.exit(2, f"{problem}\n")
    wanted = {
        kind: words for kind, words in methods.items() if not options.methods or name_of(words) in options.methods
    }
    kept = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    merged = {kind: dict(bases) for kind, bases in kept.get("verdicts", {}).items() if kind in methods}
    families: dict[str, dict[str, str]] = kept.get("families", {})
    everything = options.bases is None and options.families is None and options.engines is None
    bases = [*BASES] if everything else options.bases or []
    jobs = [(kind, words, base) for kind, words in wanted.items() for base in bases]
    trained = {kind: words for kind, words in wanted.items() if kind != "LORA+qalora"}  # it needs GPTQ files
    chosen = [*TINY] if everything or options.families == [] else options.families or []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = pool.map(judge, [words for _, words, _ in jobs], [base for *_, base in jobs])
        for (kind, _, base), verdicts in zip(jobs, results, strict=True):
            before = merged.get(kind, {}).get(base, {})
            of_engines = {key: why for key, why in before.items() if key in ENGINES and verdicts["trains"] == WORKS}
            update(merged, kind, base, verdicts | of_engines)
        if jobs and not options.check:
            write(merged, families)
        for family, failing in zip(chosen, pool.map(judge_family, chosen, [trained] * len(chosen)), strict=True):
            before = families.get(family, {})
            now = {kind: why for kind, why in before.items() if kind in methods and kind not in trained} | failing
            print(family, now if now != before else "unchanged", flush=True)
            families[family] = now
            if not options.check:  # a session that is cut off loses no family
                write(merged, families)
    for kind, base, verdicts in judge_engines(trained, merged, [*ENGINES] if everything else options.engines or []):
        update(merged, kind, base, merged[kind][base] | verdicts)
        if not options.check:
            write(merged, families)
    print(f"{len(ASPECTS)} aspects of {len(jobs)} combinations, {len(trained)} methods on {len(chosen)} families")


def unknown(chosen: Sequence[str], names: Sequence[str]) -> str:
    """Return what is wrong with the first name that is no method's; empty if all are."""
    for name in chosen:
        if name not in names:
            form = "A variant of LoRA is one word, in quotes: nox -s compatibility -- 'lora dora'"
            is_variant = f"lora {name}" in names
            hint = f"; did you mean 'lora {name}'?" if is_variant else did_you_mean(name, names)
            return f"no such method: '{name}'{hint} {form}"
    return ""


def missing_packages() -> str:
    """Return what to install of LIBRARIES; empty if all are there. Without one, verdicts would be about its absence."""
    missing = []
    for name in LIBRARIES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if not missing:
        return ""
    install = "pip install -c constraints.txt -e '.[quantizers]'"
    return f"not installed: {', '.join(missing)}: `nox -s compatibility` installs them, as does {install}"


def update(merged: Verdicts, kind: str, base: str, verdicts: dict[str, str]) -> None:
    """Replace the verdicts of a kind of method on a kind of base; print them if they are others than before."""
    print(kind, base, verdicts if verdicts != merged.get(kind, {}).get(base) else "unchanged", flush=True)
    merged.setdefault(kind, {})[base] = verdicts


def write(verdicts: Verdicts, families: dict[str, dict[str, str]]) -> None:
    """Write the file of verdicts and the page."""
    libraries = {name: version(name).split("+")[0] for name in LIBRARIES}
    results = {"libraries": libraries, "verdicts": verdicts, "families": families}
    FILE.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
    TABLE.write_text(table(verdicts, libraries, families), "utf-8")


if __name__ == "__main__":
    main()
