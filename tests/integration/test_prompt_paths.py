"""What `generate`, servers and Ollama send is, token for token, the prompt that training used."""

from collections import Counter
from pathlib import Path

import pytest
from helpers.prompt_paths import FORMATS, Dialogue, Paths, compare, dialogues
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DIALOGUES = st.lists(dialogues(), min_size=10, max_size=10)


QUICK = (
    "ChatML", "ChatML, dataset.system_message", "ChatML, tokenizer that adds BOS", "ChatML that writes BOS",
    "Llama 3's", "Gemma's", "alpaca, tokenizer that adds BOS and EOS",
    "alpaca, tokenizer that begins with another token",
    "prompt_completion, dataset.prompt_template",
    "prompt_completion, pieces with a mark at the beginning", "text, tokenizer that adds BOS",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in FORMATS]
)
def test_every_path_sends_the_same_prompt(name: str, tmp_path: Path):
    paths, counts = Paths(name, tmp_path), Counter[str]()

    @settings(max_examples=1 if name in QUICK else 20, suppress_health_check=list(HealthCheck))
    @given(DIALOGUES)
    def check(asked: list[Dialogue]) -> None:
        compare(paths, asked, counts)

    check()
    assert counts["dialogues"] + counts["refused"] > 0
