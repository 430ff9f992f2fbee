"""The section `quantization`: how the frozen base is stored."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_exp.config.sections.base import Dtype, Section

OTHER_WEIGHTS = {"torchao": ("int8", "float8"), "quanto": ("int8", "float8", "int4", "int2")}
"""What quantizers beside bitsandbytes store a weight as."""


class QuantizationConfig(Section):
    """How the frozen base is stored: fields of transformers' BitsAndBytesConfig, TorchAoConfig and QuantoConfig."""

    name: str = "none"
    quant_method: Literal["bitsandbytes", "torchao", "quanto", "gptq", "awq"] = "bitsandbytes"
    """What stores it. gptq, awq: the model's own files are quantized so."""
    weights: Literal["int8", "float8", "int4", "int2"] | None = None
    """torchao (int8, float8) and quanto: what a weight is stored as."""
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    """Quantize the quantization constants too: about 0.4 bits less for each parameter."""
    bnb_4bit_compute_dtype: Literal["auto"] | Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU that has it, else float16."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """int8: activations above it are computed unquantized."""

    @property
    def quantized(self) -> bool:
        """Whether the base is stored in a few bits."""
        return self.bitsandbytes or self.quant_method != "bitsandbytes"

    @property
    def bitsandbytes(self) -> bool:
        """Whether it is stored by bitsandbytes, which does not run on Apple's GPUs."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _check(self) -> Self:
        bnb = self.quant_method == "bitsandbytes"
        if self.load_in_4bit + self.load_in_8bit + (not bnb) > 1:
            raise ValueError("load_in_4bit, load_in_8bit and another quant_method exclude each other")
        possible = OTHER_WEIGHTS.get(self.quant_method)
        if self.weights not in (possible or (None,)):
            told = f"one of {', '.join(possible)}" if possible else "null"
            raise ValueError(f"weights={self.weights}: with quant_method={self.quant_method} it must be {told}")
        return self
