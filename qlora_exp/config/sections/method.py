"""The sections `method` and `lora_variant`: which parameters train. Their settings are PEFT's own."""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from qlora_exp.config import peft_methods
from qlora_exp.config.sections.base import PeftSettings


class MethodConfig(PeftSettings):
    """Which parameters train. Every other key is a setting of the PEFT config named by `peft_type`."""

    name: str = "full"
    peft_type: str | None = None
    """PEFT's own name of the method (LORA, IA3, ...); null trains all parameters."""
    quantized_base: bool | None = None
    """true: needs a quantized base; false: refuses one; null: takes those that it was seen to work on."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the trainable adapter weights, whatever the base. auto: float32."""

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
    """How LoRA is scaled, split and initialised. Every other key is a setting of PEFT's LoraConfig."""

    name: str = "lora"
    init_rows: PositiveInt = 64
    """Training rows that EVA, CorDA and LoRA-GA look at to start."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := peft_methods.check("lora_variant", "LORA", self.settings):
            raise ValueError("\n".join(problems))
        return self
