"""Sections `method` and `lora_variant`: which parameters are trained. Most of their settings are PEFT's own."""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from qlora_exp.config.sections.base import PeftSettings
from qlora_exp.config.tables import peft_methods


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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.peft_type is None:
            problems = [f"{name}: a method without peft_type takes no PEFT settings" for name in self.settings]
        else:
            problems = peft_methods.check("method", self.peft_type, self.settings)
        if problems:
            raise ValueError("\n".join(problems))
        return self


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
