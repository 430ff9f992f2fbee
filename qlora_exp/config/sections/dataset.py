"""Sections `dataset` and `unrelated`: where rows come from, their prompt format, and how they are split."""

import re
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from qlora_exp.config.patterns import fault
from qlora_exp.config.sections.base import Section, Share, check_location
from qlora_exp.utils import prompt_templates

REASONING_GYM = "reasoning_gym:"
"""Prefix of a dataset path that names a reasoning-gym task."""
FILE_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""Format of a file's rows by its suffix, in small letters."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files, such as `rows.jsonl.gz`."""
URL_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "http", "https")
"""File systems that rows are fetched from."""
_DICT_FILE, _TABLE_FILE = "dataset_dict.json", "state.json"


def file_format(name: str | PurePath) -> str | None:
    """Return the format of a file's rows by its name, in letters of any case; None if it is no such file."""
    path = PurePath(str(name).lower())
    return FILE_FORMATS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def is_url(path: str) -> bool:
    """Return whether `path` is a file or a folder of another file system, such as `s3://bucket/rows.jsonl`."""
    return "://" in path


def is_pattern(path: str) -> bool:
    """Return whether `path` is a pattern for the names of files, such as `rows/*.jsonl`."""
    return any(sign in path for sign in "*?[")


def looks_local(path: str) -> bool:
    """Return whether `path` names files or folders, and not a dataset on the hub."""
    named = file_format(path) is not None or is_url(path) or is_pattern(path) or path.startswith((".", "/", "~"))
    return named or Path(path).exists()


def saved_dataset(path: str) -> Literal["table", "splits"] | None:
    """Return whether `path` is a folder that `save_to_disk` of `datasets` wrote: one table, or several splits."""
    if (Path(path) / _DICT_FILE).is_file():
        return "splits"
    return "table" if (Path(path) / _TABLE_FILE).is_file() else None


def _check_place(value: str | None) -> str | None:
    if value is None or not is_url(value):
        return check_location(value)
    scheme, _, rest = value.partition("://")
    if scheme not in URL_SCHEMES or "::" in value:
        raise ValueError(f"begins with {scheme}://; rows are fetched from {', '.join(f'{s}://' for s in URL_SCHEMES)}")
    user, _, _ = rest.partition("/")[0].rpartition("@")
    has_secret = ":" in user or (user and scheme not in ("az", "abfs")) or re.search(r"[?;&]\w[\w-]*=", rest)
    if has_secret or (scheme.startswith("http") and "?" in rest):
        raise ValueError(
            "is a URL with a user name, a password or a query, which would be recorded; leave them out, and set the "
            "file system's own variables (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...), or "
            "download the file"
        )
    return value


class DatasetConfig(Section):
    """Training and held-out rows: where they come from, their prompt format, and how they are split."""

    name: str = "construction_faq"
    """Label of the dataset in run names and tables."""
    path: str = "embedded:construction_faq"
    """Hub id, file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; also .gz, .bz2, .xz or .zst), folder or pattern of
    files, URL of these (s3://, gs://, hf://, https://), `embedded:construction_faq` (built-in) or
    `reasoning_gym:TASK`."""
    subset: str | None = None
    """Hub datasets: name of the dataset's configuration."""
    revision: str | None = None
    """Hub datasets: branch, tag or commit. null: the default branch."""
    split: str = "train"
    """Hub datasets and folders of `DatasetDict.save_to_disk`: split with the rows."""
    eval_path: str | None = None
    """Where the held-out rows come from, written like `path`. null: split them off `path`."""
    eval_split: str | None = None
    """Hub datasets and folders as for `split`: split of `path` with the held-out rows. null: split them off `split`."""
    eval_size: Share | Annotated[int, Field(gt=0, strict=True)] = 0.1
    """Held-out rows, as a share (below 1) or a number of rows. Not with eval_path or eval_split."""
    validation_size: Share | Annotated[int, Field(gt=0, strict=True)] | None = None
    """Rows to split off the training rows, as a share (below 1) or a number of rows, on which settings are chosen. They
    are never trained on. null: none."""
    evaluate_on: Literal["validation"] | None = None
    """validation: evaluate on the validation rows, while settings are chosen. null: on the held-out rows."""
    split_seed: int = 42
    """Random seed of the split, the choice of rows and reasoning_gym's tasks. Independent of the run's `seed`."""
    max_train_rows: PositiveInt | None = None
    """Largest number of training rows. null: all."""
    max_eval_rows: PositiveInt | None = None
    """Largest number of held-out rows. null: all."""
    format: Literal["alpaca", "auto", "chat", "prompt_completion", "text"] = "alpaca"
    """alpaca: Alpaca's two prompts, with and without input. chat: the model's chat template.
    prompt_completion: the columns without a template. text: plain text, loss on all tokens. auto: recognized from the
    first rows, with the columns that you do not name; runs record what it was."""
    prompt_template: str | None = None
    r"""chat, prompt_completion: the prompt as a text with names of columns in braces, such as
    `Question: {question}\nAnswer:`, in the place of prompt_column and input_column. `\n` is a line break, `\t` a tab,
    two backslashes are one."""
    chat_template: str | None = None
    """chat: Jinja file (.jinja) whose template replaces the tokenizer's. null: the tokenizer's own."""
    prompt_column: str = "instruction"
    """Column with the prompt (the instruction or question)."""
    input_column: str | None = "input"
    """Column with optional context. chat, prompt_completion: appended to the prompt. null: no context."""
    completion_column: str = "output"
    """Column with the answer. chat: text, or messages, of which all answers are learned."""
    messages_column: str | None = None
    """chat: column with complete dialogues: lists of messages (role and content, or from and value), or their JSON
    text. The last assistant turn is the completion; with `weight: 0` or `train: false` it is not learned. A column
    `tools` holds the schemas of functions, if the template renders them."""
    history_column: str | None = None
    """chat: column with the earlier turns of a row: pairs of question and answer, or messages. null: none."""
    system_column: str | None = None
    """chat: column with the system message of a row. null: none."""
    text_column: str = "text"
    """text: column with the text."""
    system_message: str | None = None
    """chat: system message of every row that has none of its own. null: the model's template decides."""
    drop_matching: str | None = None
    """Regular expression. Rows whose completion contains a match are left out."""
    drop_duplicates: Literal["exact"] | bool = "exact"
    """Rows to leave out after the first of their kind. exact: rows with the same prompt, input and answer (or the same
    dialogue). true: rows with the same prompt and input, whatever the answer. false: none."""
    drop_leaks: Literal["none", "exact", "near"] = "exact"
    """Training rows to leave out. exact: same prompt as a held-out row; near: also rows with similar text."""
    leak_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Smallest share of common five-word sequences at which two rows count as near, in the leak report and for
    drop_leaks."""
    streaming: bool = False
    """Read the first rows only, as many as max_train_rows and eval_size (a number of rows) need, and half as many
    again for those that are left out. Of hub datasets, no more than these are fetched."""
    reasoning_gym_size: PositiveInt = 500
    """reasoning_gym: number of rows to generate, including the held-out rows."""
    reasoning_gym_config: dict[str, int | float | str | bool] = {}
    """reasoning_gym: fields of the task's config."""

    @property
    def paths(self) -> list[str]:
        """Sources of the rows: `path` and `eval_path` where they are set."""
        return [path for path in (self.path, self.eval_path) if path and path != "none"]

    @property
    def parts(self) -> dict[str, "DatasetConfig"]:
        """The datasets that the rows come from, by the names of sources; one alone is `dataset`."""
        return {"dataset": self}

    @field_validator("path", "eval_path", mode="before")
    @classmethod
    def _one_file(cls, path: Any) -> Any:
        if isinstance(path, list | tuple):
            raise ValueError("must be one path; name several files by a folder or a pattern, such as rows/*.jsonl")  # noqa: TRY004
        return path

    _location = field_validator("path", "eval_path")(_check_place)

    @field_validator("drop_matching")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern and (why := fault(pattern)):
            raise ValueError(f"{pattern!r:.80} is no regular expression: {why}")
        return pattern

    @field_validator("prompt_template")
    @classmethod
    def _names_columns(cls, template: str | None) -> str | None:
        if template is not None:
            prompt_templates.columns(template)
        return template

    @property
    def hub_paths(self) -> list[str]:
        """Datasets of the hub among `paths`."""
        return [
            path for path in self.paths if not path.startswith(("embedded:", REASONING_GYM)) and not looks_local(path)
        ]

    @property
    def has_splits(self) -> bool:
        """Whether a source has splits: a dataset of the hub, or a folder of `DatasetDict.save_to_disk`."""
        return any(path in self.hub_paths or saved_dataset(path) == "splits" for path in self.paths)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.eval_path and self.eval_split:
            raise ValueError("eval_path and eval_split exclude each other: set one of them")
        chats = self.format in ("chat", "auto")
        if self.system_message and not chats:
            raise ValueError(f"format={self.format} has no system message: use format=chat, or system_message=null")
        for key in ("messages_column", "chat_template", "history_column", "system_column"):
            if getattr(self, key) and not chats:
                raise ValueError(f"{key} needs format=chat")
        if self.prompt_template and not (chats or self.format == "prompt_completion"):
            raise ValueError(f"prompt_template: format={self.format} has its own prompt; use format=prompt_completion")
        if self.prompt_template and self.completion_column in prompt_templates.columns(self.prompt_template):
            raise ValueError(f"prompt_template contains the answer: completion_column={self.completion_column}")
        for key in ("messages_column", "history_column", "system_column"):
            if self.prompt_template and getattr(self, key):
                raise ValueError(f"prompt_template and {key} exclude each other: set one of them")
        if self.chat_template and not re.search(r"\{[{%]", self.chat_template):
            raise ValueError("chat_template must be a Jinja template: name its file, which ends in .jinja")
        if self.evaluate_on == "validation" and self.validation_size is None:
            raise ValueError("evaluate_on=validation needs validation rows: set validation_size, such as 0.1")
        if self.streaming and isinstance(self.validation_size, float):
            raise ValueError("streaming needs limits: set validation_size as a number of rows")
        if self.streaming and (self.max_train_rows is None or self.eval_size < 1):
            raise ValueError("streaming needs limits: set max_train_rows, and eval_size as a number of rows")
        return self


class UnrelatedConfig(DatasetConfig):
    """Text used to measure forgetting: how much the loss of its held-out rows rises. Keys as in `dataset`."""

    name: str = "none"
    """Label of the text."""
    path: str = "none"
    """As `dataset.path`, or `embedded:python_docs` (built-in). none: forgetting is not measured."""
    format: Literal["alpaca", "auto", "chat", "prompt_completion", "text"] = "text"
    """As `dataset.format`."""
