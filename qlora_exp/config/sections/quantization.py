"""Section `quantization`: how the frozen base model is stored."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_exp.config.sections.base import Dtype, Section

OTHER_WEIGHTS = {"torchao": ("int8", "float8"), "quanto": ("int8", "float8", "int4", "int2")}
"""Weight types that the quantizers other than bitsandbytes can store."""


class QuantizationConfig(Section):
    """How the frozen base is stored: fields of transformers' BitsAndBytesConfig, TorchAoConfig and QuantoConfig."""

    name: str = "none"
    """Label of the quantization in run names and tables."""
    quant_method: Literal["bitsandbytes", "torchao", "quanto", "gptq", "awq"] = "bitsandbytes"
    """Library or format of the quantized weights. gptq, awq: the model's files are already quantized."""
    weights: Literal["int8", "float8", "int4", "int2"] | None = None
    """torchao (int8, float8) and quanto (all four): type of the stored weights."""
    load_in_4bit: bool = False
    """bitsandbytes: store the base in 4 bits."""
    load_in_8bit: bool = False
    """bitsandbytes: store the base in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit NormalFloat (nf4) or 4-bit float (fp4)."""
    bnb_4bit_use_double_quant: bool = False
    """Double quantization: quantize the quantization constants too, which saves about 0.4 bits per parameter."""
    bnb_4bit_compute_dtype: Literal["auto"] | Dtype = "auto"
    """Data type of the computation. auto: float32 on a CPU, bfloat16 on a GPU that supports it, else float16."""
    bnb_4bit_experts: bool = False
    """Store the fused experts of a mixture of experts in 4 bits too, not in the model's dtype. The options nf4, fp4,
    nf4_double and fp4_double set it; runs of older versions did not."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """int8: activations above this value are computed without quantization."""

    @property
    def quantized(self) -> bool:
        """Whether the base is quantized, by whichever library."""
        return self.bitsandbytes or self.quant_method != "bitsandbytes"

    @property
    def bitsandbytes(self) -> bool:
        """Whether bitsandbytes quantizes the base. bitsandbytes does not run on Apple GPUs."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def packs_experts(self) -> bool:
        """Whether fused experts are stored in 4 bits."""
        return self.load_in_4bit and self.bnb_4bit_experts

    @model_validator(mode="after")
    def _check(self) -> Self:
        bnb = self.quant_method == "bitsandbytes"
        if self.load_in_4bit + self.load_in_8bit + (not bnb) > 1:
            raise ValueError("load_in_4bit, load_in_8bit and another quant_method exclude each other")
        possible = OTHER_WEIGHTS.get(self.quant_method)
        if self.weights not in (possible or (None,)):
            allowed = f"one of {', '.join(possible)}" if possible else "null"
            raise ValueError(f"weights={self.weights}: with quant_method={self.quant_method} it must be {allowed}")
        return self
