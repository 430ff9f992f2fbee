"""Check plain values against the schema, and explain errors."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from qlora_exp.config import crosschecks, plugins
from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import SearchConfig
from qlora_exp.config.tables import peft_methods, sft_arguments
from qlora_exp.utils import prompt_templates
from qlora_exp.utils.errors import ConfigError, did_you_mean
from qlora_exp.utils.secrets import redact

OPEN_SECTIONS = ("method", "lora_variant")
"""Sections with PEFT settings: `method.use_rslora=true` needs no `+`, and `schema` rejects settings PEFT lacks."""
SFT_CONFIG = "training.sft_config"
"""Key of the arguments of TRL's SFTConfig that have no key of their own."""


def from_dict(values: Any) -> Config:
    """Build the typed config from nested dictionaries, e.g. those of a recorded run.

    Raises:
        ConfigError: the values are invalid; the message lists every problem, one per line.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error))) from error
    if problems := [*crosschecks.problems(config)]:
        raise ConfigError("\n".join(problems))
    return config


def from_composed(values: Any) -> Config:
    """Build the typed config from values of option files and overrides, as `from_dict` does.

    A config holds templates, not where and how the user wrote them: Jinja files are read, and `\\n` in a prompt
    template becomes a line break. A recorded config has them so already.

    Raises:
        ConfigError: a file cannot be read, the values are invalid, or no installed package has a metric or loss.
    """
    for name in ("dataset", "unrelated"):
        if isinstance(section := values.get(name), dict):
            for key, value in section.items():
                section[key] = as_written(f"{name}.{key}", value)
            sources = section.get("sources")
            for source, keys in sources.items() if isinstance(sources, dict) else ():
                if isinstance(keys, dict):
                    keys |= {key: as_written(f"{name}.sources.{source}.{key}", value) for key, value in keys.items()}
    config = from_dict(values)
    if problems := [*plugins.problems(config)]:  # in records they are another machine's
        raise ConfigError("\n".join(problems))
    return config


def as_written(key: str, value: Any) -> Any:
    """Return the value of a key that the user wrote as the config holds it.

    Raises:
        ConfigError: it names a file that cannot be read.
    """
    section, _, name = re.sub(r"^(dataset\.)sources\.[^.]+\.", r"\1", key).partition(".")
    if section not in ("dataset", "unrelated") or not isinstance(value, str):
        return value
    if name == "prompt_template":
        return prompt_templates.unescaped(value)
    if name == "chat_template" and value.endswith(".jinja"):
        try:
            return Path(value).expanduser().read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{key}: {value} cannot be read: {reason}") from error
    return value


def known_keys() -> list[str]:
    """List every dotted key that a config can have, including PEFT's LoRA settings and TRL's further arguments."""

    def walk(prefix: str, section: type[BaseModel]) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield f"{prefix}{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(f"{prefix}{name}.", field.annotation)

    lora = [f"{section}.{name}" for section in OPEN_SECTIONS for name in peft_methods.settings("LORA")]
    return [*walk("", Config), *lora, *(f"{SFT_CONFIG}.{name}" for name in sft_arguments.ACCEPTED)]


_ELSEWHERE = {
    "evaluation_strategy": "set training.eval_strategy instead",
    "group_by_length": "set training.train_sampling_strategy=group_by_length instead",
    "load_in_4bit": "set quantization=nf4_double instead",
    "load_in_8bit": "set quantization=int8 instead",
    "warmup_ratio": "set training.warmup_steps instead, to a share of all steps below 1",
    **dict.fromkeys(("fp32", "use_fp32"), "set model.dtype=float32 training.bf16=false training.fp16=false instead"),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_name", "tokenizer_name_or_path", "processing_class", "use_fast_tokenizer"),
        "the tokenizer is that of model.model_name_or_path; for new tokens set model.new_tokens, for another chat "
        "template dataset.chat_template",
    ),
    **dict.fromkeys(
        ("use_auth_token", "token", "hf_token", "hub_token", "auth_token"),
        "tokens are in no config: set the environment variable HF_TOKEN, or run `hf auth login`",
    ),
    **dict.fromkeys(
        ("use_flash_attention_2", "use_flash_attention", "use_flash_attn", "flash_attn"),
        "set model.attn_implementation=flash_attention_2 instead",
    ),
    **dict.fromkeys(("no_cuda", "device_type"), "set device=cpu, cuda or mps instead"),
}
"""What takes the place of keys that are elsewhere here than in transformers, TRL and other programs."""


def no_such_key(key: str) -> str:
    """Return the message for an unknown key, with the most similar existing keys."""
    if key.rpartition(".")[2] in ("output_dir", "out", "output"):
        return f"{key}: no such key or group; the output folder is hydra.run.dir=FOLDER"
    if (setting := key.removeprefix("hydra.sweeper.")) != key:
        own = {"direction": "search.directions", "n_jobs": "sweep.n_jobs"}
        own |= {name: f"search.{name}" for name in SearchConfig.model_fields}
        hint = f"; did you mean '{own[setting]}'?" if setting in own else did_you_mean(setting, own.values())
        return f"{key}: Hydra has no such key{hint} `qlora-exp keys search` lists the settings of searches"
    if key == "hydra.launcher.n_jobs":
        return f"{key}: this launcher has no such key; did you mean 'sweep.n_jobs'?"
    if key.startswith("hydra."):
        if (hint := did_you_mean(key, _launcher_keys())) != ".":
            return f"{key}: Hydra has no such key{hint} +{key}=VALUE adds one for a plugin"
        return f"{key}: Hydra has no such key (--cfg hydra shows its keys); +{key}=VALUE adds one for a plugin"
    name = key.rpartition(".")[2]
    if (key == name or key.partition(".")[0] in ("training", "model", "dataset")) and name in _ELSEWHERE:
        return f"{key}: no such key; {_ELSEWHERE[name]}"
    name = key.removeprefix("training.").removeprefix("sft_config.")
    elsewhere = (*sft_arguments.ACCEPTED, *sft_arguments.OWN_KEYS) if name == key else ()
    if "." not in name and name in sft_arguments.declared() and name not in elsewhere:
        refused = sft_arguments.refusal(name)
        return f"{key}: {refused}" if refused else f"{key}: no such key; did you mean '{SFT_CONFIG}.{name}'?"
    if (hint := did_you_mean(key, known_keys())) != ".":
        return f"{key}: no such key or group{hint}"
    section = key.rpartition(".")[0]
    return f"{key}: no such key or group; `{f'qlora-exp keys {section}'.strip()}` lists them"


def _launcher_keys() -> list[str]:
    """Return the settings of all shipped launchers."""

    def walk(prefix: str, node: Any) -> Iterator[str]:
        for name, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}.{name}"
            yield from walk(f"{prefix}.{name}", value)

    files = (conf_dir() / "hydra" / "launcher").glob("*.yaml")
    return [key for file in files for key in walk("hydra.launcher", OmegaConf.to_container(OmegaConf.load(file)))]


_OF_UNION = re.compile(r"(?:int|float|bool|str|constrained-\w+|(?:literal|list|dict)\[.*\])")
"""Names of a union's types, which Pydantic adds to the place of a problem."""


def _lines(error: ValidationError) -> Iterator[str]:
    """Describe each problem; a value that fits no type of a union is one."""
    by_place: dict[str, list[Any]] = {}
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if not _OF_UNION.fullmatch(str(part)))
        by_place.setdefault(where, []).append(problem)
    for where, problems in by_place.items():
        first = problems[0]
        if len(problems) == 1 or first["input"] is None or any(each["type"] == "value_error" for each in problems):
            yield from dict.fromkeys(_describe(each, where) for each in problems)
            continue
        fitting = dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in problems)
        yield f"{where}: Input should be {' or '.join(fitting)}, got {redact(repr(first['input'])):.200}"


def _describe(problem: Any, where: str) -> str:
    if problem["type"] == "extra_forbidden":
        group, _, inner = where.partition(".")
        if group == "experiment" or inner.partition(".")[0] in ("hydra", *Config.model_fields):
            return (
                f"{where}: no such key; the option file of {group} that sets it lacks '# @package _global_' in its "
                "first line"
            )
        return no_such_key(where)
    if problem["input"] is None or problem["type"] == "string_too_short":
        return f"{where}: must be given; add {where}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if message.startswith(f"{where}.") or not where else f"{where}: {message}"
    if problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float):
        return f"{where}: must be text, got {problem['input']}; quote it: {where}='\"{problem['input']}\"'"
    values = re.findall("'([^']*)'", problem["ctx"]["expected"]) if problem["type"] == "literal_error" else []
    hint = did_you_mean(str(problem["input"]), values).removesuffix(".")
    return f"{where}: {message}, got {redact(repr(problem['input'])):.200}{hint}"
