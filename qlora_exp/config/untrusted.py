"""Read a config that somebody else wrote: as plain data, without settings that only the user may allow."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.config import idle, plugins
from qlora_exp.config.conf_folder import GROUPS
from qlora_exp.config.patterns import may_hang
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import REASONING_GYM, is_pattern, is_url
from qlora_exp.config.validate import as_written, from_dict
from qlora_exp.utils.errors import ConfigError

_LONGEST_TEXT = 1 << 20
"""Characters of a YAML text; a config has about ten thousand."""
_MOST_NODES = 50_000
_DEEPEST = 50
_LONGEST_NUMBER = 40
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Plain(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML loader for trees of `_check_events`, in which numbers are as short as those of people."""


def _number(loader: Any, node: yaml.ScalarNode) -> Any:
    if _BASE_60.fullmatch(node.value):  # 1:30 is a text, as in YAML 1.2
        return node.value
    if len(node.value) > _LONGEST_NUMBER:
        raise yaml.YAMLError(f"a number of {len(node.value)} digits")
    build = loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float
    return build(node)


_Plain.add_constructor("tag:yaml.org,2002:int", _number)
_Plain.add_constructor("tag:yaml.org,2002:float", _number)


def _check_events(text: str) -> None:
    """Reject what can be costly: aliases (a few lines can expand to gigabytes), deep nesting, and very many nodes."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, _Plain)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        if depth > _DEEPEST or count > _MOST_NODES:
            raise yaml.YAMLError("nested too deeply" if depth > _DEEPEST else f"more than {_MOST_NODES} values")


def _check_keys(value: Any) -> None:
    """Reject keys that are no text. Numbers can be chosen so that a dictionary of them takes minutes to build."""
    if isinstance(value, yaml.MappingNode):
        for key, _ in value.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.YAMLError(f"the key {getattr(key, 'value', '[...]')!r:.40} is no text")
    for part in value.value if isinstance(value, yaml.CollectionNode) else ():
        for node in part if isinstance(part, tuple) else (part,):
            _check_keys(node)


def plain_yaml(text: str, what: str) -> Any:
    """Parse untrusted YAML that holds only numbers, strings, lists and mappings, in about a second at most.

    Args:
        text: the YAML.
        what: what the text is, for messages.

    Raises:
        ConfigError: the text is not YAML, it contains anything else, or it is too large.
    """
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"{what} is not plain YAML of a config: it has more than {_LONGEST_TEXT:,} characters")
    try:
        _check_events(text)
        _check_keys(yaml.compose(text, _Plain))
        values = yaml.load(text, _Plain)
        json.dumps(values, default=str, ensure_ascii=False).encode()
    # ValueError: an impossible date, half a character
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{what} is not plain YAML: {' '.join(str(error).split())[:300]}") from error
    return values


_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
"""Settings of PEFT methods that can be regular expressions, or have them as keys."""
_ALWAYS_ALLOWED = 8
"""Number of processes that a recorded config may start on any machine."""
_NOT_FILES = ("embedded:", "random:", REASONING_GYM)


def changed(values: dict[str, Any], changes: Mapping[str, Any], whose: str) -> Config:
    """Apply the user's changes to a recorded config and check the result.

    Args:
        values: the recorded config as nested dictionaries.
        changes: dotted keys and their values; they override the recorded ones.
        whose: whose config it is, for messages.

    Raises:
        ConfigError: the config is invalid, or it asks for something that only the user may allow.
    """
    for key, value in changes.items():
        place: Any = values
        *sections, name = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{section} of {whose} must be a mapping, got {place!r:.40}")
        if not sections and name in GROUPS and not isinstance(value, dict):
            raise ConfigError(
                f"{key}={value}: only keys of {whose} can be changed, such as {name}.KEY=VALUE, not options"
            )
        place[name] = as_written(key, value)
    try:
        config = from_dict(values)
        refuse_user_only_settings(config, changes)
    except ConfigError as error:
        raise ConfigError(f"{whose}: {error}") from error
    if problems := [*idle.problems([config], [*changes])]:
        raise ConfigError("\n".join(problems))
    return config


def refuse_user_only_settings(config: Config, changes: Mapping[str, Any]) -> None:
    """Reject recorded settings that could run the author's code or read this machine's files.

    Args:
        config: the recorded config with the changes applied.
        changes: dotted keys that the user set; these are allowed.

    Raises:
        ConfigError: there is such a setting, and it is not among `changes`.
    """
    if config.model.trust_remote_code and "model.trust_remote_code" not in changes:
        raise ConfigError(
            "the recorded config runs code from the model's repository; if you trust it, "
            "add model.trust_remote_code=true"
        )
    if (own := config.evaluation.lm_eval_include_path) and "evaluation.lm_eval_include_path" not in changes:
        raise ConfigError(
            "the recorded config uses lm-eval tasks from a folder, and these can run code; if you trust it, "
            f"add evaluation.lm_eval_include_path={own}"
        )
    if (tasks := config.evaluation.lm_eval_tasks) and "evaluation.lm_eval_tasks" not in changes:
        raise ConfigError(
            "the recorded config uses lm-eval tasks, and some run code that a model generates; if you trust both, add "
            f"evaluation.lm_eval_tasks=[{','.join(tasks)}]"
        )
    if "/" in (kernel := config.model.attn_implementation or "") and "model.attn_implementation" not in changes:
        raise ConfigError(
            f"the recorded config uses a kernel from the hub; if you trust it, add model.attn_implementation={kernel}"
        )
    _refuse_processes(config, changes)
    paths: dict[str, Any] = {
        "model.model_name_or_path": config.model.model_name_or_path,
        "model.adapter": config.model.adapter,
        "training.resume_from_checkpoint": config.training.resume_from_checkpoint,
    }
    datasets = {"dataset": config.dataset.model_dump(), "unrelated": config.unrelated.model_dump()}
    datasets |= {f"dataset.sources.{name}": source for name, source in config.dataset.sources.items()}
    for section, rows in datasets.items():
        paths |= {f"{section}.{key}": rows.get(key) for key in ("path", "eval_path")}
    for section, part in (("method", config.method), ("lora_variant", config.lora_variant)):
        paths |= {f"{section}.{key}": value for key, value in part.settings.items()}
    patterns = {key: value for key, value in paths.items() if key.rpartition(".")[2] in _PATTERNS}
    patterns["method.unfrozen_parameters"] = config.method.unfrozen_parameters
    patterns["optimizer.optim_target_modules"] = config.optimizer.optim_target_modules
    patterns |= {f"{section}.drop_matching": rows.get("drop_matching") for section, rows in datasets.items()}
    for key, pattern in ((key, text) for key, value in patterns.items() for text in _texts(value)):
        if pattern and key not in changes and may_hang(pattern):
            raise ConfigError(
                f"the recorded config has the regular expression {pattern!r:.80}, which may run for ever; if you trust "
                f"it, add {key}=VALUE with it"
            )
    for key, path in ((key, path) for key, value in paths.items() for path in _texts(value)):
        if not path or key in changes:
            continue
        if "${" in path:
            raise ConfigError(f"the recorded config has {key}={path}, and records have no references: add {key}=VALUE")
        if path.startswith(REASONING_GYM):
            raise ConfigError(
                "the recorded config uses a reasoning-gym task, and some run code that a model generates; "
                f"if you trust it, add {key}={path}"
            )
        if path.startswith(_NOT_FILES):
            continue
        if is_url(path):
            raise ConfigError(f"the recorded config fetches {path}; if you trust it, add {key}={path}")
        local = _expanded(path)
        looks_local = _exists(local) or path.startswith(("/", "~", ".")) or ".." in local.parts
        if any(not place.resolve().is_relative_to(Path.cwd()) for place in _places(local, looks_local)):
            raise ConfigError(
                f"the recorded config names {path}, which is outside of this folder (records have no rows and no "
                f"models: ask whoever trained it for them); to allow it, add {key}=PATH with its path on this machine"
            )


def refuse_plugins(config: Config, changes: Mapping[str, Any]) -> None:
    """Reject metrics and losses of installed packages that a record names, before a config of it is run.

    They are code of this machine, which only its user may choose. What only reads a model or rows never imports them.

    Args:
        config: the recorded config with the changes applied.
        changes: dotted keys that the user set; these are allowed.

    Raises:
        ConfigError: there is one that the user did not name, or that is not installed.
    """
    for kind, name in plugins.named(config):
        key, built_in = plugins.KEYS[kind], plugins.BUILT_IN[kind]
        if key in changes:
            plugins.find(kind, name)
            continue
        recorded = config.evaluation.metrics if kind == "metric" else [name]
        choices = recorded, [each for each in recorded if each in built_in] if kind == "metric" else built_in[:1]
        with_it, without = (",".join(names) for names in choices)
        words = [f"{key}=[{names}]" if kind == "metric" else f"{key}={names}" for names in (with_it, without)]
        raise ConfigError(
            f"the recorded config runs a {kind} of an installed package, {name}, which only you may choose; add "
            f"{words[0]} to run it, or {words[1]} to do without it"
        )


def _refuse_processes(config: Config, changes: Mapping[str, Any]) -> None:
    """Reject a recorded config that connects to other machines, or starts very many processes."""
    shared = config.distributed
    if shared.main_process_ip and "distributed.main_process_ip" not in changes:
        raise ConfigError(
            f"the recorded config connects to {shared.main_process_ip}, which could run code here; add "
            "distributed.num_machines=1 distributed.main_process_ip=null, or the addresses of your own machines"
        )
    most = max(_ALWAYS_ALLOWED, os.cpu_count() or 1)
    loaders = config.training.dataloader_num_workers
    if loaders > most and "training.dataloader_num_workers" not in changes:
        raise ConfigError(
            f"the recorded config reads rows in {loaders} processes, more than this machine has cores; add "
            "training.dataloader_num_workers=0, or that number if you want it"
        )
    if shared.num_processes != "auto" and shared.num_processes > most and "distributed.num_processes" not in changes:
        raise ConfigError(
            f"the recorded config starts {shared.num_processes} processes, more than this machine has cores; if you "
            f"want that, add distributed.num_processes={shared.num_processes}"
        )


def _places(path: Path, looks_local: bool) -> Iterator[Path]:
    """Yield the files that a path may name: itself, those of a folder, those that match a pattern."""
    if looks_local:
        yield path
    if path.is_dir():
        yield from path.rglob("*")
    elif is_pattern(str(path)):
        yield from map(Path, glob(str(path), recursive=True))


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~NAME of a user whom this machine does not know
        return Path(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long for a file, or has a NUL
        return False


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in (*value, *value.values()) for text in _texts(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _texts(item))


def given(words: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` words, with YAML values, into a dictionary.

    Raises:
        ConfigError: a word has no `=`, or its value is not plain YAML.
    """
    if wrong := [word for word in words if "=" not in word]:
        raise ConfigError(f"'{wrong[0]}' is not KEY=VALUE")
    return {key: plain_yaml(value, key) for key, value in (word.split("=", 1) for word in words)}
