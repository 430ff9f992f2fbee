"""Sections `method` and `lora_variant`: which parameters are trained. Most of their settings are PEFT's own."""

import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import PositiveInt, model_validator

from qlora_exp.config.patterns import fault
from qlora_exp.config.sections.base import PeftSettings
from qlora_exp.config.tables import peft_methods

PARTS = ("trainable_layers", "unfrozen_parameters", "lisa_activated_layers", "lisa_interval_steps")
"""Keys of full fine-tuning that trains a part of the model, or parts of it in turn."""


def names_in(pattern: str) -> re.Pattern[str]:
    """Return the expression that names of parameters match in full if an item of `unfrozen_parameters` names them.

    An item is a whole name, the end of one, or a module with all that is in it.

    Raises:
        re.error: it is no regular expression, or none inside another one (`(?i)`).
    """
    return re.compile(rf"(?:.*\.)?(?:{pattern})(?:\..*)?")


class MethodConfig(PeftSettings):
    """Which parameters are trained. Any further key is a setting of the PEFT config that belongs to `peft_type`."""

    name: str = "full"
    """Label of the method in run names and tables."""
    peft_type: str | None = None
    """PEFT's name of the method (LORA, IA3, ...). null: full fine-tuning, which trains all parameters."""
    quantized_base: bool | None = None
    """true: requires a quantized base; false: rejects one; null: rejects only those on which the method fails."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the trainable adapter weights, independent of the base. auto: float32."""
    trainable_layers: int | None = None
    """Full fine-tuning of so many last layers only; negative: of so many first ones. All else is frozen."""
    unfrozen_parameters: list[str] = []
    """Full fine-tuning of these parameters only, and of `trainable_layers`: regular expressions of names, or of their
    ends, of parameters or of modules, which are trained with all that is in them: lm_head, norm, layers.(10|11).mlp."""
    lisa_activated_layers: PositiveInt | None = None
    """LISA: number of random layers that are trained at a time, with all that is outside the layers."""
    lisa_interval_steps: PositiveInt | None = None
    """LISA: steps after which other layers are drawn."""

    @property
    def parts(self) -> dict[str, Any]:
        """The keys of full fine-tuning in parts that are set, with their values."""
        return {key: value for key in PARTS if (value := getattr(self, key))}

    @property
    def freezes(self) -> bool:
        """Whether only a part of the model's own parameters is trained."""
        return self.trainable_layers is not None or bool(self.unfrozen_parameters)

    @property
    def freezes_first(self) -> bool:
        """Whether the last layers are trained and nothing else."""
        return (self.trainable_layers or 0) > 0 and not self.unfrozen_parameters

    @property
    def kind(self) -> str:
        """PEFT's type, or the kind of full fine-tuning: FULL, FREEZE, LISA."""
        return self.peft_type or ("FREEZE" if self.freezes else "LISA" if self.lisa_activated_layers else "FULL")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.peft_type is None:
            problems = [f"{name}: a method without peft_type takes no PEFT settings" for name in self.settings]
        else:
            problems = peft_methods.check("method", self.peft_type, self.settings)
        problems += self._frozen()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _frozen(self) -> Iterator[str]:
        """Check the keys of full fine-tuning in parts."""
        lisa = self.lisa_activated_layers, self.lisa_interval_steps
        if (None in lisa) and (self.name == "lisa" or lisa != (None, None)):
            yield "lisa needs both lisa_activated_layers and lisa_interval_steps"
        if lisa != (None, None) and (self.peft_type is not None or self.freezes):
            yield "lisa_activated_layers is for full fine-tuning of all layers in turn: use method=lisa alone"
        if self.freezes and self.peft_type is not None:
            keys = "trainable_layers and unfrozen_parameters"
            yield f"{keys} are for full fine-tuning, not an adapter: use PEFT's layers_to_transform and modules_to_save"
        if self.trainable_layers == 0:
            yield "trainable_layers=0 trains nothing: use a number of last layers, or null with unfrozen_parameters"
        if self.name == "freeze" and not self.freezes:
            yield "freeze trains all parameters without trainable_layers and unfrozen_parameters: set one of them"
        for pattern in self.unfrozen_parameters:
            if why := fault(pattern) or fault(f"(?:{pattern})"):  # it is put into a longer one
                yield f"unfrozen_parameters: '{pattern:.80}' is not a valid regular expression: {why}"


class LoraVariantConfig(PeftSettings):
    """How LoRA is scaled, split and initialized. Any further key is a setting of PEFT's LoraConfig."""

    name: str = "lora"
    """Label of the variant in run names and tables."""
    init_rows: PositiveInt = 64
    """Number of training rows from which EVA, CorDA and LoRA-GA initialize the adapter."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := peft_methods.check("lora_variant", "LORA", self.settings):
            raise ValueError("\n".join(problems))
        return self
