"""Rows, datasets of one's own files, and tokenized rows."""

from functools import cache

from datasets import Dataset
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import tokenization

TEXT = st.text(min_size=1, max_size=60, alphabet=st.characters(blacklist_categories=("Cs",))).filter(str.strip)


ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


def own_dataset(path: str, **more) -> DatasetConfig:
    """Configure a dataset of prompts and completions in a file."""
    fields = {"format": "prompt_completion", "prompt_column": "prompt", "completion_column": "completion"}
    return DatasetConfig(path=path, **({"input_column": None} | fields | more))


composed = cache(lambda *overrides: compose(overrides))
"""Hydra takes a fifth of a second, for each of hypothesis' examples."""


def tokenized(rows: list[dict], tokenizer, *overrides: str) -> Dataset:
    """Tokenize rows with the default config, changed by the given overrides."""
    return tokenization.tokenize(Dataset.from_list(rows), composed(*overrides), tokenizer)
