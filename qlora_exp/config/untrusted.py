"""Read somebody else's config: as plain data, without what only the user may allow."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import REASONING_GYM
from qlora_exp.config.validate import from_dict
from qlora_exp.utils.errors import ConfigError


class _Plain(yaml.SafeLoader):
    """YAML without aliases, with which a few lines can be gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def plain_yaml(text: str, what: str) -> Any:
    """What somebody else's YAML says: numbers, texts, lists, mappings.

    Raises:
        ConfigError: it is no YAML, or more than that.
    """
    try:
        return yaml.load(text, _Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no such date, too long a number
        raise ConfigError(f"{what} is no plain YAML: {' '.join(str(error).split())[:300]}") from error


_NOT_FILES = ("embedded:", "random:", REASONING_GYM)


def changed(values: dict[str, Any], changes: Mapping[str, Any], whose: str) -> Config:
    """A recorded config with the changes of whoever asks, as far as a record may decide it.

    Args:
        values: the config, nested and plain.
        changes: dotted keys with their values, which win.
        whose: the config is, for messages.

    Raises:
        ConfigError: it is no valid config, or asks for what only the user may allow.
    """
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        place = values.setdefault(section, {}) if section else values
        if not isinstance(place, dict):
            raise ConfigError(f"{section} of {whose} is no mapping but {place!r:.40}")
        place[name] = value
    config = from_dict(values)
    refuse_what_only_users_may_allow(config, changes)
    return config


def refuse_what_only_users_may_allow(config: Config, changes: Mapping[str, Any]) -> None:
    """Whatever of a record could run its author's code or read this machine's files, unless the user says it too.

    Raises:
        ConfigError: there is such a thing, and it is not among `changes`.
    """
    if config.model.trust_remote_code and "model.trust_remote_code" not in changes:
        raise ConfigError(
            "the record asks to run code from the model's repository; if you trust it: model.trust_remote_code=true"
        )
    if (own := config.evaluation.lm_eval_include_path) and "evaluation.lm_eval_include_path" not in changes:
        raise ConfigError(
            "the record asks for lm-eval's tasks from a folder, and they can run code; if you trust what is there: "
            f"evaluation.lm_eval_include_path={own}"
        )
    if (tasks := config.evaluation.lm_eval_tasks) and "evaluation.lm_eval_tasks" not in changes:
        raise ConfigError(
            "the record asks for tasks of lm-eval, and some run what a model answers; if you trust them and the model: "
            f"evaluation.lm_eval_tasks=[{','.join(tasks)}]"
        )
    if "/" in (kernel := config.model.attn_implementation or "") and "model.attn_implementation" not in changes:
        raise ConfigError(
            f"the record asks for a kernel of the hub; if you trust it: model.attn_implementation={kernel}"
        )
    paths: dict[str, Any] = {
        "model.model_name_or_path": config.model.model_name_or_path,
        "dataset.path": config.dataset.path,
        "dataset.eval_path": config.dataset.eval_path,
        "unrelated.path": config.unrelated.path,
        "unrelated.eval_path": config.unrelated.eval_path,
        "training.resume_from_checkpoint": config.training.resume_from_checkpoint,
    }
    for section, part in (("method", config.method), ("lora_variant", config.lora_variant)):
        paths |= {f"{section}.{key}": value for key, value in part.settings.items()}
    for key, path in ((key, path) for key, found in paths.items() for path in _texts(found)):
        if not path or key in changes:
            continue
        if path.startswith(REASONING_GYM):
            raise ConfigError(
                f"the record asks for a task of reasoning-gym, and some run what a model answers; if you want it: "
                f"{key}={path}"
            )
        if path.startswith(_NOT_FILES):
            continue
        local = Path(path).expanduser()
        looks_local = local.exists() or path.startswith(("/", "~", ".")) or ".." in local.parts
        if looks_local and not local.resolve().is_relative_to(Path.cwd()):
            raise ConfigError(
                f"the record names {path}, outside of this folder; to use it, or where it is here: {key}=PATH"
            )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for one in (*value, *value.values()) for text in _texts(one))
    elif isinstance(value, list | tuple):
        yield from (text for one in value for text in _texts(one))


def given(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words with YAML values.

    Raises:
        ConfigError: a word is not of that form.
    """
    if wrong := [word for word in words if "=" not in word]:
        raise ConfigError(f"'{wrong[0]}' is no key=value")
    return {key: plain_yaml(value, key) for key, value in (word.split("=", 1) for word in words)}
