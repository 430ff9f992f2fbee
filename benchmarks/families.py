"""Test what works with each family of models on a tiny random one, from training to llama.cpp; write the page.

    nox -s families                   # all (a quarter of an hour)
    nox -s families -- qwen3 gemma2   # only these; results of others stay

Writes docs/reference/families.md and benchmarks/families.json. Prints the results that differ from those in the file.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from qlora_exp.config.tables.compatibility import REFUSED, WORKS
from qlora_exp.models.builtin import TINY
from qlora_exp.utils.quiet import quiet

FILE = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parent.parent / "docs" / "reference" / "families.md"
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "xllamacpp")
FEATURES = (
    "lora",
    "qlora",
    "full",
    "gradient checkpointing",
    "packing",
    "evaluation",
    "save and load",
    "merge",
    "GGUF",
    "presets",
)
"""Columns of the page. `studies.families` tests them; it imports torch, so that they are named here too."""
MODELS = {
    "bloom": "BLOOM",
    "cohere2": "Command R7B, Aya",
    "deepseek_v3": "DeepSeek-V3, R1",
    "falcon": "Falcon 7B, 40B",
    "falcon_h1": "Falcon-H1",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "glm4": "GLM-4",
    "glm4_moe": "GLM-4.5",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gpt_oss": "gpt-oss",
    "gptj": "GPT-J",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4 H",
    "jamba": "Jamba",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 8B-A1B",
    "llama": "Llama 2 to 3.3, SmolLM2, DeepSeek-R1-Distill-Llama",
    "mamba": "Mamba",
    "mamba2": "Mamba 2, Codestral Mamba",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2 57B-A14B",
    "qwen3": "Qwen3",
    "qwen3_5_text": "Qwen3.5",
    "qwen3_moe": "Qwen3 30B-A3B, 235B-A22B",
    "qwen3_next": "Qwen3-Next",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
}
"""Models of each family."""
INTRODUCTION = """\
# What works with which family of models

Results of complete runs of a tiny random model of each family ({libraries}; on a CPU). Do not edit this page:
`nox -s families` writes it. `qlora-exp train model=tiny_llama model.model_name_or_path=random:FAMILY` trains such a
model. [compatibility.md](compatibility.md) has the same for methods and variants of LoRA.

- lora, qlora, full: the held-out loss falls; only what is trained changes; on a 4-bit base gradients are those of its
  values; what is saved has the same logits when it is loaded.
- gradient checkpointing: the same loss as without.
- packing: packed rows give the same logits as single rows.
- evaluation: the held-out loss is the same in training and after it; answers to prompts of unequal length are the same
  in one batch as alone, with the cache as without.
- save and load: what each of the three methods saved has the held-out loss that was measured after training.
- merge: the merged model has the same logits.
- GGUF: llama.cpp has the same log probabilities as transformers.
- presets: all of `method.target_modules` (all-linear, attention, mlp, q_v, outputs) name layers.

**no** means that one line says so and what to do, before or right after the model is loaded; the reasons are below.

"""


def judge(family: str) -> dict[str, str]:
    """Test one family, in a worker process."""
    quiet()
    from transformers.utils import logging

    from qlora_exp.studies.families import family_features

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return family_features(family, Path(folder))


def page(results: dict[str, dict[str, str]], libraries: dict[str, str]) -> str:
    """Return the text of the page."""
    text = INTRODUCTION.format(libraries=", ".join(f"{name} {number}" for name, number in sorted(libraries.items())))
    text += _row(["family", "models", *FEATURES]) + _row(["---"] * (2 + len(FEATURES)))
    reasons: dict[tuple[str, str], list[str]] = {}
    for family, verdicts in sorted(results.items()):
        text += _row([f"`{family}`", MODELS[family], *(_cell(verdicts.get(feature)) for feature in FEATURES)])
        for feature in FEATURES:
            if (verdict := verdicts.get(feature, WORKS)) != WORKS:
                why = verdict.removeprefix(REFUSED).replace(f"of type {family} are", "of this type are")
                reasons.setdefault((feature, why), []).append(f"`{family}`")  # one line for all with the same reason
    text += "\n## Why not\n\n" + _row(["what", "families", "why"]) + _row(["---"] * 3)
    order = sorted(reasons.items(), key=lambda each: FEATURES.index(each[0][0]))
    return text + "".join(_row([feature, ", ".join(on), why.replace("|", "/")]) for (feature, why), on in order)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cell(verdict: str | None) -> str:
    if verdict is None:
        return "?"
    return "yes" if verdict == WORKS else "no" if verdict.startswith(REFUSED) else "**fails**"


def main() -> None:
    """Run the tests, print the changes, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"default: all of {', '.join(TINY)}")
    parser.add_argument("--check", action="store_true", help="only print the changes, write no file")
    options = parser.parse_args()
    if unknown := {*options.families} - TINY.keys():
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    kept: dict[str, dict[str, str]] = json.loads(FILE.read_text("utf-8"))["families"] if FILE.is_file() else {}
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        chosen = options.families or [*TINY]
        for family, found in zip(chosen, pool.map(judge, chosen), strict=True):
            before = kept.get(family)
            print(family, "unchanged" if found == before else _others(found, before or {}), flush=True)
            kept[family] = found
            if not options.check:  # a session that is cut off loses no family
                write(kept)


def _others(found: dict[str, str], before: dict[str, str]) -> str:
    changed = {feature: verdict for feature, verdict in found.items() if verdict != before.get(feature, WORKS)}
    return ", ".join(f"{feature}: {verdict}" for feature, verdict in changed.items()) or "works"


def write(results: dict[str, dict[str, str]]) -> None:
    """Write the file of results and the page."""
    libraries = {name: version(name).split("+")[0] for name in LIBRARIES}
    text = json.dumps({"libraries": libraries, "families": results}, indent=1, sort_keys=True)
    FILE.write_text(text + "\n", "utf-8")
    PAGE.write_text(page(results, libraries), "utf-8")


if __name__ == "__main__":
    main()
