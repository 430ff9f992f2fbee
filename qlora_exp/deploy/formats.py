"""Names of the export formats and of the servers, and which bases an adapter can go into.

Imports nothing heavy, so that the command line starts quickly.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_exp.config.schema import Config

BITSANDBYTES = ("nf4", "nf4_double", "fp4", "fp4_double", "int8")
GPTQ_FORMATS = ("gptq", "awq")
COMPRESSED = ("w4a16", "w4a16_awq", "w8a8", "fp8")
"""Formats of compressed-tensors files, which vLLM loads."""
EXPORT_FORMATS = ("merged", "gguf", *BITSANDBYTES, *GPTQ_FORMATS, *COMPRESSED)
"""Formats that `export` writes."""
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Types in which the `gguf` library can store weights. llama.cpp's `llama-quantize` makes other types from an f16 or
bf16 file."""
FINE_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that keep what an adapter changes of weights that were stored in few bits before."""
SERVERS = ("transformers", "vllm", "llama.cpp")
"""Engines that `serve` answers with: transformers in this process, or the programs of others."""
FIRST = "default"
"""Name of the model that a command is given without a name, next to adapters that have one."""
TRAINED = "trained"
DEPLOYED: dict[str, dict[str, Any]] = {
    TRAINED: {},
    "merged": {"form": "merged"},
    "merged_files": {"form": "merged", "base": "files"},
    "nf4": {"form": "nf4"},
    "int8": {"form": "int8"},
    "gptq": {"form": "gptq"},
    "w4a16": {"form": "w4a16"},
    "gguf_q8_0": {"form": "gguf", "type_": "q8_0"},
    "gguf_q4_0": {"form": "gguf", "type_": "q4_0"},
}
"""Formats that `deployment-gap` measures, by name, with their arguments of `export.export`. `TRAINED`, the model as it
was trained, is not exported and has none."""


def why_one_base(config: "Config") -> str:
    """Return why an adapter goes only into the weights that it was trained on; empty if into those of the files too."""
    stored = config.quantization
    if not stored.quantized:
        return "its base was not quantized in training"
    if stored.quant_method in ("gptq", "awq"):
        return "the base model's files are quantized themselves"
    return f"this adapter makes up for what {stored.name} lost (LoftQ)" if config.lora_start == "loftq" else ""
