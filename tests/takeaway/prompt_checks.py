"""Many random dialogues through everything that prompts a model, llama.cpp included (`nox -s takeaway`)."""

from collections import Counter
from pathlib import Path

import pytest
from helpers.prompt_paths import FORMATS, Dialogue, Paths, compare, dialogues
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

total: Counter[str] = Counter()


@pytest.mark.parametrize("name", FORMATS)
def test_every_path_sends_the_same_prompt(name: str, tmp_path: Path):
    paths = Paths(name, tmp_path)
    server = paths.llama_cpp()

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.lists(dialogues(), min_size=1, max_size=20))
    def check(asked: list[Dialogue]) -> None:
        compare(paths, asked, total, server)

    check()
    print(name, dict(total))
