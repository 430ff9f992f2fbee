"""Probing finds again what is kept, and finds what is broken."""

import json
from typing import Any

import pytest
import torch
from support import exit_code

from qlora_exp.config.tables import compatibility
from qlora_exp.config.tables.compatibility import ASPECTS, BASES, WORKS
from qlora_exp.studies import probe
from qlora_exp.studies.probe import kinds

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_quanto")]

RECORDED = json.loads(compatibility.FILE.read_text("utf-8"))
KEPT = RECORDED["verdicts"]
KINDS = kinds()
METHODS = [kind for kind in KINDS if "+" not in kind]
VARIANTS = [f"LORA+{name}" for name in ("dora", "kasa", "monteclora", "olora", "velora")]
"""Variants of LoRA that no other test tries."""
REFUSED = {"ADAMSS": "4bit", "DEFT": "4bit", "FULL": "quanto", "GLORA": "8bit", "HIRA": "torchao", "HRA": "8bit"}
"""One of each way to fail: a dtype, a shape, no gradient, a layer that PEFT refuses, no kernel, a wrong gradient."""


def one_base_each() -> list[Any]:
    """Pair every second method with one of the bases that it works on, in turn; two of three are `thorough`."""
    pairs = []
    for place, kind in enumerate(METHODS[::2]):
        works = [base for base in BASES if KEPT[kind][base]["trains"] == WORKS]
        marks = pytest.mark.thorough if place % 3 else ()
        pairs.append(pytest.param(kind, works[place % len(works)], marks=marks))
    return pairs


# Of each sort one with all that trainers do: into the layers, before the rows, moving ranks.
THROUGHOUT = ["LORA", "PREFIX_TUNING", "ADALORA"]


def outcome(verdict: str | None) -> str | None:
    """Works or not: the numbers in a reason depend on the machine."""
    return verdict if verdict in (None, WORKS) else "fails"


# Every sixth method on one base (`nox -s thorough`: every second): what the libraries can do changes only with their
# versions, and then `nox -s compatibility` tries all on every base.
@pytest.mark.parametrize(
    ("kind", "base"), [*one_base_each(), *((kind, "plain") for kind in VARIANTS), *REFUSED.items()]
)
def test_recorded_training_verdict_is_reproduced(kind: str, base: str):
    found = probe.verdicts(KINDS[kind], base, ["trains"])
    assert outcome(found["trains"]) == outcome(KEPT[kind][base]["trains"]), found


@pytest.mark.parametrize("kind", THROUGHOUT)
def test_recorded_verdicts_of_all_aspects_are_reproduced(kind: str):
    found = probe.verdicts(KINDS[kind], "plain")
    assert {aspect: outcome(verdict) for aspect, verdict in found.items()} == {
        aspect: outcome(KEPT[kind]["plain"][aspect]) for aspect in ASPECTS
    }, found


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("LORA", "gpt_bigcode"),
        ("LORA", "qwen3_moe"),
        ("IA3", "gpt2"),
        ("IA3", "phi3"),
        ("LORA+lora_ga", "falcon"),
        ("LORA+olora", "gpt2"),
        ("LORA+pissa", "mixtral"),
        ("LORA+pissa", "qwen2_moe"),
        pytest.param("SHIRA", "qwen2_moe", marks=pytest.mark.thorough),
        ("OSF", "gpt2"),
        ("TRAINABLE_TOKENS", "gemma2"),
    ],
)
def test_recorded_verdict_of_a_family_is_reproduced(kind: str, family: str):
    assert probe.family_verdict(KINDS[kind], family) == RECORDED["families"][family].get(kind, WORKS)


def test_changed_frozen_weights_are_detected(monkeypatch):
    attach = probe.adapters.attach

    def drift(layer, _inputs) -> None:
        layer.weight.data.add_(0.01)

    def leaky(*arguments):
        adapted = attach(*arguments)
        norm = next(layer for name, layer in adapted.named_modules() if name.endswith("norm"))
        norm.register_forward_pre_hook(drift)
        return adapted

    monkeypatch.setattr("qlora_exp.models.adapters.attach", leaky)
    assert "others" in probe.verdicts(KINDS["LORA"], "plain", ["trains"])["trains"]


def test_wrong_base_gradient_is_detected(monkeypatch):
    weight_of = probe.quantization.weight_of

    def other(layer):
        return None if (weight := weight_of(layer)) is None else torch.randn_like(weight)

    monkeypatch.setattr(probe.quantization, "weight_of", other)
    found = probe.verdicts(KINDS["LORA"], "8bit", ["trains"])["trains"]
    assert found != WORKS


def test_missing_saved_weights_are_detected(monkeypatch):
    monkeypatch.setattr("peft.PeftModel.save_pretrained", lambda self, folder, **_: _without_b(self, folder))
    assert "what is loaded is not what was saved" in probe.verdicts(KINDS["LORA"], "plain", ["trains"])["trains"]


def _without_b(model, folder) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model.peft_config["default"].save_pretrained(folder)
    kept = {name: p.contiguous() for name, p in get_peft_model_state_dict(model).items() if "lora_B" not in name}
    save_file(kept, f"{folder}/adapter_model.safetensors")


def test_probe_command_shows_its_verdicts(capsys):
    assert exit_code("probe", "method=houlsby") == 0
    shown = capsys.readouterr().out
    assert "gradient_checkpointing" in shown
    assert "non-linearity" in shown


def test_probe_command_rejects_an_unknown_method(capsys):
    assert exit_code("probe", "method=houslby") == 1
    assert "no option 'houslby'" in capsys.readouterr().err
