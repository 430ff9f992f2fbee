"""Describe every key of the config, and every setting of PEFT's methods."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_exp.config import idle
from qlora_exp.config.describe import notes
from qlora_exp.config.describe.types import limits, spelled
from qlora_exp.config.describe.units import unit
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import peft_help, peft_methods, sft_arguments
from qlora_exp.config.validate import SFT_CONFIG


@dataclass(frozen=True)
class Entry:
    """What there is to say about a key.

    Attributes:
        key: dotted name, such as `training.max_steps`.
        type: type of its values, as a user writes them.
        default: default value of the key, or PEFT's default of a setting.
        meaning: what it does, as text that may have line breaks.
        range: what is allowed besides the type; empty if there is no more to say.
        unit: unit of a number; empty if it has none.
        advice: advice on its value.
    """

    key: str
    type: str
    default: Any
    meaning: str
    range: str = ""
    unit: str = ""
    advice: tuple[notes.Advice, ...] = ()


def sections() -> dict[str, type[BaseModel] | None]:
    """Return the sections of the config, and None for keys outside of sections."""
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        name: kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None for name, kind in kinds.items()
    }


def of_section(name: str) -> Iterator[Entry]:
    """Yield the declared keys of a section, without those that change nothing in any run."""
    section = sections()[name]
    if section is None:
        yield _of_field(name, Config.model_fields[name])
        return
    for key, field in section.model_fields.items():
        if f"{name}.{key}" not in idle.ALWAYS:
            yield _of_field(f"{name}.{key}", field)


def _of_field(key: str, field: FieldInfo) -> Entry:
    advice = notes.LEARNING_RATE if key == "training.learning_rate" else ()
    bounds = limits(field.annotation, field.metadata)
    return Entry(key, spelled(field.annotation), field.default, field.description or "", bounds, unit(key), advice)


def sft_config() -> Iterator[Entry]:
    """Yield the further arguments of TRL's SFTConfig that a run takes."""
    for name, kind in sft_arguments.accepted().items():
        key = f"{SFT_CONFIG}.{name}"
        yield Entry(key, spelled(kind), None, sft_arguments.MEANINGS[name], limits(kind), unit(key))


def setting(name: str, peft_type: str = "LORA", section: str = "method") -> Entry:
    """Describe a setting of a PEFT method.

    Raises:
        KeyError: the method has no such setting, or PEFT ignores it with this method.
    """
    if name not in peft_methods.of_options(peft_type):
        raise KeyError(name)
    helped = peft_help.methods_with(name)[peft_type]
    kind = spelled(peft_methods.settings(peft_type)[name])
    note = notes.NOTES.get(name) if peft_type == "LORA" else None
    text = f"{note.meaning}\nPEFT: {helped.text}" if note else helped.text
    bounds = peft_methods.allowed_range(name)
    return Entry(f"{section}.{name}", kind, helped.default, text, bounds, advice=note.advice if note else ())


def methods_with(name: str) -> list[str]:
    """List the PEFT types with which a setting changes something; LoRA first."""
    having = [kind for kind in peft_methods.trainable() if name in peft_methods.of_options(kind)]
    return sorted(having, key=lambda kind: (kind != "LORA", kind))
