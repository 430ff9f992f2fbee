"""The sections `dataset` and `unrelated`: which text, in which prompt format, split how."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from qlora_exp.config.sections.base import Section, Share

REASONING_GYM = "reasoning_gym:"
"""What a dataset path begins with that names a task of reasoning-gym."""
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffixes of dataset files, with the names of their readers in `datasets`."""


class DatasetConfig(Section):
    """Which text, in which prompt format, split how."""

    name: str = "construction_faq"
    path: str = "embedded:construction_faq"
    """Hub id, a .jsonl/.json/.csv/.parquet file, `embedded:construction_faq` or `reasoning_gym:TASK`."""
    subset: str | None = None
    """Hub datasets: the configuration name."""
    revision: str | None = None
    split: str = "train"
    eval_path: str | None = None
    """A file with the held-out rows; null splits them off `path`."""
    eval_split: str | None = None
    """A split of `path` with the held-out rows; null splits them off `split`."""
    eval_size: Share | Annotated[int, Field(gt=0, strict=True)] = 0.1
    """Share or number of rows held out when there is no eval_path or eval_split."""
    split_seed: int = 42
    """Seeds the split and the choice of rows, independently of the run's seed."""
    max_train_rows: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None
    format: Literal["alpaca", "chat", "prompt_completion", "text"] = "alpaca"
    """alpaca: Alpaca's two prompts, with and without input; chat: the model's chat template; text: all tokens learn."""
    prompt_column: str = "instruction"
    input_column: str | None = "input"
    """Optional context; appended to the prompt in chat and prompt_completion."""
    completion_column: str = "output"
    messages_column: str | None = None
    """chat: a column of whole dialogues; the last assistant turn is the completion."""
    text_column: str = "text"
    system_message: str | None = None
    """chat: null leaves it to the model's template."""
    drop_matching: str | None = None
    """Regular expression; rows whose completion matches are left out."""
    drop_duplicates: bool = True
    """Keep only the first of rows with the same prompt and input; of dialogues, of those that are wholly the same."""
    drop_leaks: Literal["none", "exact", "near"] = "exact"
    """Training rows to leave out because of a held-out row: exact: with the same prompt; near: with like text too."""
    leak_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of five-word sequences in common from which two rows count as near in the leak report."""
    streaming: bool = False
    """Hub: fetch rows one by one and stop when there are enough: max_train_rows, and the held-out ones of eval_size."""
    reasoning_gym_size: PositiveInt = 500
    """reasoning_gym: rows generated, held-out ones included."""
    reasoning_gym_config: dict[str, int | float | str | bool] = {}
    """reasoning_gym: fields of the task's own config."""

    @property
    def paths(self) -> list[str]:
        """Where rows come from."""
        return [path for path in (self.path, self.eval_path) if path and path != "none"]

    @property
    def files(self) -> list[Path]:
        """Those of `paths` that are local files, whether they are there or not."""
        given = [Path(path) for path in self.paths]
        return [path for path in given if path.suffix in FILE_FORMATS or path.exists()]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.eval_path and self.eval_split:
            raise ValueError("eval_path and eval_split exclude each other")
        if self.system_message and self.format != "chat":
            raise ValueError(f"system_message has no place in format '{self.format}': use format=chat")
        if self.messages_column and self.format != "chat":
            raise ValueError("messages_column needs format=chat")
        if self.streaming and (self.max_train_rows is None or self.eval_size < 1):
            raise ValueError("streaming needs to know when to stop: max_train_rows, and an eval_size in rows")
        return self


class UnrelatedConfig(DatasetConfig):
    """Text that the run is not about: its loss after training less that before is what the run made the model forget.

    The rows that are held out of it are used; keys are those of a dataset.
    """

    name: str = "none"
    path: str = "none"
    """As a dataset's, or `embedded:python_docs`; `none`: forgetting is not measured."""
    format: Literal["alpaca", "chat", "prompt_completion", "text"] = "text"
