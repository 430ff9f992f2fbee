import pytest
from pydantic import ValidationError

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.utils.errors import ConfigError


@pytest.mark.parametrize("size", [0, 1.0, -1, 0.0])
def test_split_without_rows_on_both_sides_is_rejected(size: float):
    with pytest.raises(ValidationError):
        DatasetConfig(eval_size=size)


@pytest.mark.parametrize("words", [["dataset.eval_size=10"], ["dataset.max_train_rows=10"]])
def test_streaming_without_row_limits_is_rejected(words: list[str]):
    with pytest.raises(ConfigError, match="streaming needs limits"):
        compose(["dataset=own", "dataset.path=org/name", "dataset.streaming=true", *words])


def test_system_message_without_the_chat_format_is_rejected():
    with pytest.raises(ConfigError, match="format=chat"):
        compose(["dataset.system_message=hi"])


def test_list_of_files_is_rejected():
    with pytest.raises(ConfigError, match="must be one path; name several files by a folder or a pattern"):
        compose(["dataset=own", "dataset.path=[a.jsonl,b.jsonl]"])


def test_invalid_regular_expression_is_rejected():
    with pytest.raises(ConfigError, match="dataset.drop_matching: .* is no regular expression"):
        compose(["dataset.drop_matching='['"])
