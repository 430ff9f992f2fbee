import pytest
from pydantic import ValidationError

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.config.validate import from_dict
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.prompt_template='Q: {}'"], "dataset.prompt_template: braces must contain the name of a column"),
        (["dataset.prompt_template='{q!r}'"], "braces must contain the name of a column and nothing else"),
        (["dataset.prompt_template='{q:>9}'"], "braces must contain the name of a column and nothing else"),
        (["dataset.prompt_template='Answer: {q'"], "dataset.prompt_template: expected '}' before end of string"),
        (["dataset.prompt_template='{q} {completion}'"], "contains the answer: completion_column=completion"),
        (["dataset.prompt_template='Answer'"], "names no column; write its name in braces"),
        (
            ["dataset.prompt_template='{q}'", "dataset.format=alpaca"],
            "has its own prompt; use format=prompt_completion",
        ),
        (
            ["dataset.prompt_template='{q}'", "dataset.format=chat", "dataset.messages_column=m"],
            "prompt_template and messages_column exclude each other",
        ),
        (["dataset.prompt_template='{q}'", "dataset.prompt_column=q"], "prompt_template names the columns"),
        (["dataset.chat_template=gone.jinja", "dataset.format=chat"], "gone.jinja cannot be read: No such file"),
        (["dataset.chat_template=rows.jsonl", "dataset.format=chat"], "must be a Jinja template: name its file"),
        (["dataset.chat_template='{{ x }}'", "dataset.format=text"], "chat_template needs format=chat"),
    ],
)
def test_template_that_cannot_be_used_is_refused(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose(["dataset=own", "dataset.path=rows.jsonl", *words])


def test_url_of_azure_names_its_account():
    path = "abfs://rows@account.dfs.core.windows.net/a.jsonl"
    assert compose(["dataset=own", f"dataset.path='{path}'"]).dataset.path == path


def test_template_of_a_command_is_recorded_as_text(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}\n", "utf-8-sig")
    words = ["dataset=own", "dataset.path=rows.jsonl", "dataset.format=chat"]
    config = compose([*words, f"dataset.chat_template={tmp_path}/mine.jinja"])
    assert config.dataset.chat_template == "{{ messages }}\n"
    template = r"dataset.prompt_template='Q: {q}\n\\theta\tA:'"
    config = compose([*words, template])
    assert config.dataset.prompt_template == "Q: {q}\n\\theta\tA:"
    assert from_dict(config.model_dump(mode="json")) == config
