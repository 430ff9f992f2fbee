"""Read the overrides of a command line: refuse what Hydra would misread, with the spelling that works.

Must not import torch.
"""

import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from qlora_exp.config.conf_folder import GROUPS
from qlora_exp.libraries.hydra import every_combination
from qlora_exp.utils.errors import ConfigError

OPTIONAL = ("experiment", "sweep")
"""Groups without which a config is complete."""
_CALL = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool|json_str)\(")


def readable(words: Sequence[str]) -> list[str]:
    """Return overrides in a spelling that Hydra takes as it is meant.

    An option that looks like a number (`experiment=1`) is quoted, and `experiment=null` undoes an earlier choice.

    Raises:
        ConfigError: an override cannot be read, or would silently mean something else.
    """
    accepted: list[tuple[str, str]] = []
    for word in words:
        override = _parse(word)
        key = override.key_or_group
        if not key.startswith("hydra") and re.search(r"(?<!\\)\$\{hydra:", word):
            raise ConfigError(no_hydra_values(key))
        is_option = key in GROUPS or key.startswith("hydra/")
        if is_option and override.package is not None and not override.is_add():
            raise ConfigError(
                f"{word}: an option cannot be moved to another place with '@'; set the keys of {override.package} "
                f"instead (`qlora-exp keys {override.package}` lists them)"
            )
        if is_option and not override.is_sweep_override():
            if key in OPTIONAL and (override.is_delete() or override.value() in (None, [])):
                accepted = [(earlier, name) for earlier, name in accepted if name != key]
                continue
            word = _with_option(word, override)
        accepted.append((word, key))
    return [word for word, _ in accepted]


def _with_option(word: str, override: Override) -> str:
    """Return an override that chooses an option by its name; raise an error if it chooses none or several."""
    key, value = override.key_or_group, override.value()
    if override.is_delete() or value in (None, []):
        raise ConfigError(no_option(key))
    if isinstance(value, list) and len(value) > 1 and key != "experiment":
        listed = ",".join(map(str, value))
        raise ConfigError(f"{word}: a run has one option of each group; for a sweep over them: -m {key}={listed}")
    if isinstance(value, str | dict) or (isinstance(value, list) and len(value) > 1):
        return word
    prefix, _, text = word.partition("=")
    return f"{prefix}={quoted(text.strip(' []'))}"


def no_option(group: str) -> str:
    """Return the message for a group from which no option is chosen."""
    full = " (without one, all parameters would be trained: that is method=full)" if group == "method" else ""
    return f"{group}: a run needs an option of this group{full}; choose one: {group}=OPTION"


def no_hydra_values(key: str) -> str:
    """Return the message for a key whose value is taken from Hydra's own config."""
    return f"{key}: values of ${{hydra:...}} are not available in the config of a run or job"


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Return every combination of the values that overrides list, as one job's overrides each.

    Raises:
        ConfigError: there is none, or an override lists its values in a way that only a search has.
    """
    for override in overrides:
        if not override.is_sweep_override():
            continue
        if override.is_interval_sweep():
            raise ConfigError(f"{override.input_line}: this works only in a search; add hydra/sweeper=optuna")
        try:
            values = list(override.sweep_string_iterator())
        except ValueError as error:  # from Python's range()
            raise ConfigError(f"{override.input_line}: {error}") from error
        if not values:
            raise ConfigError(f"{override.input_line}: no value matches, so there is no job")
    return every_combination(overrides)


def of_job(words: Sequence[str]) -> list[str]:
    """Return the overrides of one job of a sweep as Hydra takes them; `-m experiment=null,NAME` is without and with."""
    job: list[str] = []
    for word in words:
        is_option = word.partition("=")[0].lstrip("+") in GROUPS
        job += readable([word]) if is_option else [word]
    return job


def quoted(text: str) -> str:
    """Quote text as a value in Hydra's override grammar."""
    return "'" + re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text) + "'"


def _parse(word: str) -> Override:
    key, equals, _ = word.partition("=")
    if not (equals or word.startswith("~")) or not key.strip() or key != key.strip():
        raise ConfigError(f"'{word:.200}' is not KEY=VALUE, with no blanks around '='")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(unreadable(word)) from error


def unreadable(word: str) -> str:
    """Return the message for an override that is not in Hydra's grammar, with a spelling that is."""
    key, _, value = word.partition("=")
    if call := _CALL.match(value):
        return f"{word:.200}: not a valid {call[1]}(...): https://hydra.cc/docs/advanced/override_grammar/extended"
    if value[:1] in ("[", "{") and _is_open(value):
        return f"{word:.200}: a bracket is not closed; quote the whole override for the shell, as in 'KEY={{A: B}}'"
    spelled = [f"{key}={_written(value)}"]
    if "," in value and value[0] not in "[{":
        spelled.append(f"{key}={','.join(map(_written, value.split(',')))}")
    valid = [_in_shell(spelling) for spelling in dict.fromkeys(spelled) if _is_readable(spelling)]
    if not valid:
        return f"{word:.200}: Hydra cannot read this override; https://hydra.cc/docs/advanced/override_grammar/basic"
    return f"{word:.200}: this value must be quoted: {' or, as values of a sweep, '.join(valid)}"


def _is_open(value: str) -> bool:
    return any(value.count(opening) > value.count(closing) for opening, closing in ("[]", "{}"))


def _is_readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _written(value: str) -> str:
    """Write a value in Hydra's grammar: lists and mappings as they are meant in YAML, anything else as one string."""
    if value[:1] in ("[", "{"):
        try:
            return _node(yaml.safe_load(value))
        except (yaml.YAMLError, ValueError):
            return value
    bare = value.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
        bare = bare[1:-1]
    return f'"{bare}"' if not set(bare) & set("\"'\\") else quoted(bare)


def _node(node: Any) -> str:
    if isinstance(node, dict):
        return "{" + ", ".join(f"{key}: {_node(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_node, node)) + "]"
    if isinstance(node, str):
        return node if re.fullmatch(r"[A-Za-z][\w./-]*", node, re.ASCII) else _written(f" {node}".lstrip(" ") or "''")
    return "null" if node is None else str(node).lower() if isinstance(node, bool) else str(node)


def _in_shell(word: str) -> str:
    """Quote an override for a shell, with double quotes where single ones would need escapes."""
    simple = "'" in word and not set(word) & set('"$`!') and "\\\\" not in word
    return f'"{word}"' if simple else shlex.quote(word)
