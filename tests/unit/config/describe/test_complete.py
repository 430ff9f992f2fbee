import pytest

from qlora_exp.config.conf_folder import GROUPS
from qlora_exp.config.describe import entries
from qlora_exp.config.describe.complete import overrides


def completed(prefix: str) -> list[str]:
    return [word for word in overrides(prefix) if word.startswith(prefix)]


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("me", ["method=", "method."]),
        ("tuning.met", ["tuning.metric="]),
        ("method=lor", ["method=lora"]),
        ("quantization=nf4,fp", ["quantization=nf4,fp4", "quantization=nf4,fp4_double"]),
        ("training.bf16=", ["training.bf16=auto", "training.bf16=true", "training.bf16=false"]),
        ("device=c", ["device=cpu", "device=cuda"]),
        ("method.bias=", ["method.bias=none", "method.bias=all", "method.bias=lora_only"]),
        ("training.sft_config.label", ["training.sft_config.label_smoothing_factor="]),
        ("lora_variant.use_do", ["lora_variant.use_dora="]),
        ("nothing.like=", []),
        ("nothing.like", []),
        ("seed=", []),
    ],
)
def test_words_are_completed(prefix: str, words: list[str]):
    got = [word for word in completed(prefix) if "method.bias" not in word or word in words]
    assert got == words


def test_every_group_and_every_key_is_reached():
    assert {f"{group}=" for group in GROUPS} <= {*overrides("")}
    for section in entries.sections():
        for entry in entries.of_section(section):
            assert f"{entry.key}=" in completed(entry.key)
