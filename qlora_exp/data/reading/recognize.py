"""Recognize from the first rows of a source how they are to be read, which `dataset.format=auto` asks for.

What is recognized depends on the names and values of columns only: dialogues by their messages, other columns by the
names that datasets of their kind have. Rows that could be read in two ways are refused.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from qlora_exp.config import idle
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import DatasetConfig, looks_local, saved_dataset
from qlora_exp.config.sections.mixture import REPLAY, of_source
from qlora_exp.config.validate import from_dict
from qlora_exp.data import dialogues
from qlora_exp.data.reading import readers
from qlora_exp.data.reading.readers import Row
from qlora_exp.environment import data_files, hub
from qlora_exp.utils import prompt_templates
from qlora_exp.utils.env_file import load_env_file
from qlora_exp.utils.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

_ROWS, _FEWEST = 1000, 20
"""Number of rows that are looked at, and the fewest of each file."""
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "user")
_ANSWERS = ("completion", "output", "response", "answer", "answers", "solution", "assistant")
_CONTEXTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt", "system_message")
_DEFAULTS: dict[str, tuple[str | None, ...]] = {
    "prompt_column": ("instruction", "prompt"),
    "input_column": ("input", None),
    "completion_column": ("output", "completion"),
    "text_column": ("text",),
    "messages_column": (None,),
    "history_column": (None,),
    "system_column": (None,),
}
"""Columns that the schema and conf/dataset/own.yaml name: others were chosen by the user, and are kept."""

_Columns = tuple[tuple[str, str], ...]
"""Keys of the config with the columns that a row is read from."""


class Recognized(NamedTuple):
    """How rows are to be read."""

    what: str
    """The format's name, for messages."""
    settings: dict[str, str | None]
    """Keys of the dataset's config with their values: the format, and columns."""

    def line(self, config: DatasetConfig) -> str:
        """Say in one line what was recognized, with the words of the command line that do the same."""
        told = {name: value for name, value in self.settings.items() if value or getattr(config, name) != value}
        words, name = _words(told), config.path if config.name == "none" else config.name
        line = f"{name}: rows recognized as {self.what}: {words}; set these keys to choose otherwise"
        if self.settings["format"] == "prompt_completion" and not config.prompt_template:
            line += " (dataset.format=chat with the same columns: the model's chat template)"
        return line


def recognized(config: Config) -> Config:
    """Return a config with what its rows are recognized as in the place of `format=auto`, and log it.

    That is so for the rows to train on and for unrelated text.

    The result is the config that a user would have written: it has the same run key, and is what a run records.

    Raises:
        ConfigError: a key does not go with what the rows are.
        DataError: the rows cannot be read, or fit no format or several.
    """
    return recognized_each([config])[0]


def recognized_each(configs: Sequence[Config]) -> list[Config]:
    """Return several configs as `recognized` does; rows that they share are read once."""
    known: dict[str, Recognized] = {}
    settled = []
    for config in configs:
        found: dict[str, Recognized] = {}
        for name, part in _parts(config).items():
            if part.format == "auto" and part.paths:
                if (key := part.model_dump_json()) not in known:
                    known[key] = _in_source(part, name)
                    log.info("%s", of_source(known[key].line(part), name))
                found[name] = known[key]
        settled.append(_settled(config, found) if found else config)
    return settled


def _parts(config: Config) -> dict[str, DatasetConfig]:
    return {**config.dataset.parts, REPLAY: config.unrelated}


def _in_source(part: DatasetConfig, name: str) -> Recognized:
    try:
        return recognized_in(part)
    except DataError as error:
        raise DataError(of_source(str(error), name)) from error


def recognized_in(part: DatasetConfig) -> Recognized:
    """Recognize how the rows of a source are to be read.

    Raises:
        DataError: the rows cannot be read, or fit no format or several.
    """
    load_env_file()
    if part.hub_paths:
        hub.go_offline_if_unreachable()  # must come before huggingface_hub is imported
    return recognize(first_rows(part), part, part.path)


def _settled(config: Config, found: Mapping[str, Recognized]) -> Config:
    """Return a config with what its sources, by name, were recognized as.

    Raises:
        ConfigError: a key does not go with it, or the sources have several formats and none is named for the model.
    """
    data, changes, named = config.dataset, dict[str, Any](), list[str]()
    general = found[REPLAY].settings if REPLAY in found else {}
    if data.sources:
        sources = {
            name: {**own, **(found[name].settings if name in found else {})} for name, own in data.sources.items()
        }
        changes["sources"] = sources
        if data.format == "auto":
            formats = {name: sources[name].get("format", data.format) for name in sorted(sources)}
            prompted = dict.fromkeys(format_ for format_ in formats.values() if format_ != "text") or {"text": None}
            if len(prompted) > 1:
                words = " ".join(f"dataset.sources.{name}.format=auto" for name in formats)
                raise ConfigError(
                    f"dataset.format=auto: the sources have several formats, {' and '.join(prompted)}; add {words}, "
                    "and for dataset.format the one in which the saved model will be prompted"
                )
            (changes["format"],) = prompted
    elif "dataset" in found:
        changes = {**found["dataset"].settings}
        named = [f"dataset.{name}={value}" for name, value in _named(data).items()]
    if general:
        named += [f"unrelated.{name}={value}" for name, value in _named(config.unrelated).items()]
    lines = "; ".join(of_source(each.line(_parts(config)[name]), name) for name, each in found.items())
    sections = {"dataset": data.model_dump() | changes, "unrelated": config.unrelated.model_dump() | general}
    try:
        settled = from_dict(config.model_dump() | sections)
        problems = [*idle.problems([settled], named, sweeping=True)]
    except ConfigError as error:
        problems = str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(f"{problem}; {lines}" for problem in problems))
    return settled


def first_rows(config: DatasetConfig) -> list[Row]:
    """Return rows of the beginning of each file, or of the dataset, with their places.

    Raises:
        DataError: they cannot be found or read.
    """
    if looks_local(config.path) and not saved_dataset(config.path):
        files = data_files.find(config.path)
        count = max(_FEWEST, _ROWS // len(files))
        return [
            (f"{file.name}, {place}" if len(files) > 1 else place, row)
            for file in files
            for place, row in islice(readers.rows(file), count)
        ]
    from qlora_exp.data.reading import sources  # imports datasets, which takes a second

    source = sources.read(config, config.path, config.split)
    return [*islice(source.rows(source.columns), _ROWS)]


def recognize(rows: Iterable[Row], config: DatasetConfig, where: str) -> Recognized:
    """Recognize how rows are to be read.

    Args:
        rows: some rows, each with its place.
        config: the dataset's config; columns and templates that it names are used.
        where: name of the source, for errors.

    Raises:
        DataError: the rows fit no format, or several, or their answers are not all to be learned.
    """
    named, places = _named(config), dict[_Columns, str]()
    kinds: dict[str, set[str]] = {}
    for place, row in rows:
        kind_of = {name: _kind(value) for name, value in row.items()}
        for name, kind in kind_of.items():
            kinds.setdefault(name, set()).add(kind)
        for columns in _choices(kind_of, named, config):
            places.setdefault(columns, place)
    if absent := [each for columns in places for each in columns if each[1] not in kinds]:
        key, name = absent[0]
        hint = did_you_mean(name, kinds)
        raise DataError(f"dataset.{key}: {where} has no column '{name}'{hint} Its columns: {', '.join(kinds)}")
    if not places:
        raise DataError(f"{where}: {_unknown(kinds)}" if kinds else f"{where}: it has no rows")
    choices = {columns: _settings(dict(columns), kinds, named, config) for columns in places}
    if len(places) > 1:
        listed = "; ".join(
            f"{place} is read by {_words(choices[columns].settings)}" for columns, place in places.items()
        )
        raise DataError(
            f"dataset.format=auto: {where}: the rows could be read in several ways: {listed}. Set the keys of one of "
            "these; rows without its columns are left out and counted"
        )
    ((columns, place),) = places.items()
    if "prompt_column" in dict(columns) and "bool" in kinds.get("label", ()) and not named:
        raise DataError(
            f"dataset.format=auto: {where}, {place}: the column label says which answers are good; keep the rows with "
            f"label true, or set {_words(choices[columns].settings)} to learn all"
        )
    return choices[columns]


def _named(config: DatasetConfig) -> dict[str, str]:
    """Return the columns that the user chose, by key."""
    return {key: getattr(config, key) for key, usual in _DEFAULTS.items() if getattr(config, key) not in usual}


def _words(settings: Mapping[str, str | None]) -> str:
    """Return settings as words of the command line."""
    return " ".join(f"dataset.{key}={'null' if value is None else value}" for key, value in settings.items())


# Kinds of values

_TEXTS = ("text", "number")
_DIALOGUES = ("messages", "ShareGPT", "messages as JSON text", "ShareGPT as JSON text")


def _kind(value: Any) -> str:
    """Return what a value is: empty, text, number, bool, one of `_DIALOGUES`, or other."""
    if value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
        return "empty"
    if (dialogue := dialogues.parsed(value)) is not None:
        name = "messages" if all("role" in message for message in dialogue) else "ShareGPT"
        return f"{name} as JSON text" if isinstance(value, str) else name
    if isinstance(value, bool):
        return "bool"
    return "text" if isinstance(value, str) else "number" if isinstance(value, int | float) else "other"


# Choices


def _choices(kinds: Mapping[str, str], named: Mapping[str, str], config: DatasetConfig) -> Iterator[_Columns]:
    """Yield each way to read a row: the columns that it must have.

    Args:
        kinds: kind of the value of each of its columns.
        named: columns that the user chose, by key.
        config: the dataset's config.
    """
    for key in ("messages_column", "text_column"):
        if key in named:
            yield ((key, named[key]),)
            return
    names = {name.strip().casefold(): name for name in kinds}
    prompts, answers = _asked_and_answered(names, kinds, named, config)
    if config.prompt_template:
        yield from ((("completion_column", answer),) for answer in answers)
        return
    if {"prompt_column", "completion_column"} & named.keys():
        yield from _pairs(prompts, answers)
        return
    preferred = names.get("chosen") if "rejected" in names else None
    pairs = [*_pairs(prompts, answers)]
    used = {name for pair in pairs for _, name in pair}
    used |= {names[name] for name in ("chosen", "rejected", "history") if name in names}
    whole = [name for name, kind in kinds.items() if kind in _DIALOGUES and name not in used]
    if preferred is not None and kinds[preferred] in _DIALOGUES:
        beginnings = [prompt for prompt in prompts if kinds[prompt] in _DIALOGUES]
        whole = [name for name in whole if name not in beginnings]
        pairs += [*_pairs(beginnings, [preferred])] or [(("messages_column", preferred),)]
    elif preferred is not None and kinds[preferred] in _TEXTS:
        whole = [name for name in whole if name not in prompts]
        pairs += _pairs(prompts, [preferred])
    yield from pairs
    yield from ((("messages_column", name),) for name in whole)
    if not (pairs or whole or preferred) and not {*_PROMPTS, *_ANSWERS, "role", "from"} & names.keys():
        text = names.get("text") or (next(iter(kinds)) if len(kinds) == 1 else None)
        if text is not None and kinds[text] == "text":
            yield (("text_column", text),)


def _asked_and_answered(
    names: Mapping[str, str], kinds: Mapping[str, str], named: Mapping[str, str], config: DatasetConfig
) -> tuple[list[str], list[str]]:
    """Return the columns of a row that may be its prompt, and those that may be its answer."""

    def of(candidates: Sequence[str]) -> list[str]:
        found = [name for candidate in candidates for name in kinds if name.strip().casefold() == candidate]
        return [name for name in found if kinds[name] in (*_TEXTS, *_DIALOGUES)]

    if {"instruction", "input", "output"} <= names.keys():  # whatever was made of them, such as a column `text`
        prompts, answers = of(["instruction"]) or of(["input"]), of(["output"])
    else:
        prompts, answers = of(_PROMPTS) or of(["input"]), of(_ANSWERS)
    if "prompt_column" in named:
        prompts = [named["prompt_column"]]
    if "completion_column" in named:
        answers = [named["completion_column"]]
    if config.prompt_template:
        answers = [name for name in answers if name not in prompt_templates.columns(config.prompt_template)]
    return prompts, answers


def _pairs(prompts: Sequence[str], answers: Sequence[str]) -> Iterator[_Columns]:
    yield from ((("prompt_column", prompt), ("completion_column", answer)) for prompt in prompts for answer in answers)


# Settings


def _settings(
    columns: Mapping[str, str], kinds: Mapping[str, set[str]], named: Mapping[str, str], config: DatasetConfig
) -> Recognized:
    """Return how to read rows from these columns.

    Args:
        columns: the columns that each row must have, by key.
        kinds: kinds of the values of each column in all rows.
        named: columns that the user chose, by key.
        config: the dataset's config.
    """
    quoted = ", ".join(f"`{name}`" for name in columns.values())
    only_chosen = ", of which only the chosen answers are learned" if "chosen" in columns.values() else ""
    if "text_column" in columns:
        return Recognized(f"plain text ({quoted})", {"format": "text", **columns})
    more = {key: name for key, name in named.items() if key in ("history_column", "system_column")}
    names = {name.strip().casefold(): name for name, kinds_of in kinds.items() if kinds_of - {"empty"}}
    if system := next((names[name] for name in _SYSTEMS if name in names), None):
        more.setdefault("system_column", system)
    kinds_of = {kind for name in columns.values() for kind in kinds.get(name, ())}
    if "messages_column" in columns:
        what = next((kind for kind in _DIALOGUES if kind in kinds_of), "messages")
        what = "preferences" if only_chosen else what
        return Recognized(f"{what} ({quoted}){only_chosen}", {"format": "chat", **columns, **more})
    is_chat = bool(config.chat_template or config.system_message)
    if config.prompt_template:
        return Recognized(
            f"the prompt template and its answers ({quoted})",
            {"format": "chat" if is_chat else "prompt_completion", **columns},
        )
    if "history" in names:
        more.setdefault("history_column", names["history"])
    # Not only a context that these rows have: later ones may have more.
    known = (names, {name.strip().casefold(): name for name in kinds})
    context = named.get("input_column") or next((by[name] for by in known for name in _CONTEXTS if name in by), None)
    taken = None if context in columns.values() else context
    settings = {**columns, "input_column": taken}
    is_alpaca = [name.casefold() for name in columns.values()] == ["instruction", "output"]
    beside = [*more.values(), *(["tools"] if kinds.get("tools", set()) - {"empty"} else [])]
    is_chat |= bool(beside or kinds_of & {*_DIALOGUES})
    if is_alpaca:
        form, what = "chat" if is_chat else "alpaca", "Alpaca's"
    else:
        form, what = "chat" if is_chat else "prompt_completion", "prompt and answer"
    what = "conversational prompt and completion" if kinds_of & {*_DIALOGUES} else what
    what = f"{what} with {' and '.join(beside)}" if beside else what
    what = "preferences" if only_chosen else what
    return Recognized(f"{what} ({quoted}){only_chosen}", {"format": form, **settings, **more})


def _unknown(kinds: Mapping[str, set[str]]) -> str:
    """Say that rows fit no format, and why if that can be seen."""
    listed = ", ".join(f"{name} ({' or '.join(sorted(found))})" for name, found in kinds.items())
    names = {name.strip().casefold() for name in kinds}
    answers = [name for name in kinds if name.strip().casefold() in _ANSWERS]
    if {"role", "from"} & names:
        why = "each row is one message; write the messages of a dialogue into one list, in a column `messages`"
    elif {"chosen", "rejected"} <= names:
        why = "preferences without prompts; dataset.format=text dataset.text_column=chosen learns whole chosen texts"
    elif names & {*_PROMPTS} and not any(kinds[name] & {*_TEXTS, *_DIALOGUES} for name in answers):
        why = (
            "there are prompts and no answers of text under a usual name; set dataset.completion_column to the column "
            "with the answers"
        )
    else:
        why = "they have other names; set dataset.format and its columns (`qlora-exp keys dataset` lists them)"
    return f"dataset.format=auto recognizes no format in the columns {listed}: {why}"
