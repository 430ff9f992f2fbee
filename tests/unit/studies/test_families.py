"""What works with families of models is found again, and what is broken is found; `nox -s families` tries all."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from qlora_exp.config.tables.compatibility import REFUSED, WORKS
from qlora_exp.models.builtin import TINY
from qlora_exp.studies import families
from qlora_exp.studies.families import FEATURES, family_features

ROOT = Path(__file__).parents[3]
KEPT = json.loads((ROOT / "benchmarks" / "families.json").read_text("utf-8"))
OF_EACH_SORT = ("qwen3_next", "deepseek_v3", "granitemoehybrid", "gpt_oss", "opt", "mamba", "falcon")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page():
    """The program that writes the page."""
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_family_was_tried_with_every_feature_and_none_fails():
    assert KEPT["families"].keys() == TINY.keys()
    for family, verdicts in KEPT["families"].items():
        assert verdicts.keys() == FEATURES.keys(), family
        assert not [one for one in verdicts.values() if one != WORKS and not one.startswith(REFUSED)], family


def test_page_matches_the_results(page):
    assert (*FEATURES,) == page.FEATURES
    assert (ROOT / "docs" / "reference" / "families.md").read_text("utf-8") == page.page(
        KEPT["families"], KEPT["libraries"]
    )


def test_results_are_of_the_pinned_versions():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert KEPT["libraries"] == {name: pinned[name] for name in KEPT["libraries"]}


def test_recorded_result_of_one_feature_is_reproduced(tmp_path: Path):
    assert (
        family_features("olmo2", tmp_path, ["lora"]) == {"lora": KEPT["families"]["olmo2"]["lora"]} == {"lora": WORKS}
    )


@pytest.mark.thorough
@pytest.mark.parametrize("family", OF_EACH_SORT)
def test_recorded_results_are_reproduced(family: str, tmp_path: Path):
    assert family_features(family, tmp_path) == KEPT["families"][family]


@pytest.mark.thorough
def test_refused_features_say_why_and_answers_of_batches_are_compared(tmp_path: Path, monkeypatch):
    generated = families._generated

    def leaking(model, tokenizer, prompts):
        made = generated(model, tokenizer, prompts)
        return made if len(prompts) == 1 else [(ids, logits + 0.1) for ids, logits in made]

    monkeypatch.setattr(families, "_generated", leaking)
    found = family_features("opt", tmp_path, ["evaluation", "packing", "presets"])
    assert "depend on the other prompts of a batch" in found["evaluation"]
    assert found["packing"].startswith(f"{REFUSED}training.packing: the model does not keep packed rows apart")
    assert found["presets"] == WORKS


@pytest.mark.thorough
def test_difference_from_llama_cpp_is_detected(tmp_path: Path, monkeypatch):
    log_probabilities = families.llama_cpp.log_probabilities

    def shifted(server, ids, tokens):
        return {token: value + 0.5 for token, value in log_probabilities(server, ids, tokens).items()}

    monkeypatch.setattr("qlora_exp.deploy.llama_cpp.log_probabilities", shifted)
    assert "llama.cpp computes another model" in family_features("llama", tmp_path, ["GGUF"])["GGUF"]


def test_tensors_apart_are_detected():
    with pytest.raises(families.FailedError, match="differ by 0.5"):
        families._check_close("they", torch.zeros(2), torch.tensor([0.0, 0.5]))
