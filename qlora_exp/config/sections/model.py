"""The section `model`: which base model."""

from typing import Any, Literal

from qlora_exp.config.sections.base import Dtype, Section


class ModelConfig(Section):
    """Which base model."""

    model_name_or_path: str = "embedded:smollm2-135m"
    """Hub id, local folder, `embedded:smollm2-135m`, or `random:FAMILY` (opt, llama, qwen2: a tiny random model)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto"] | Dtype = "auto"
    """Of the base weights. auto: float32 on a CPU or for a full fine-tune, else bfloat16 (float16 on older GPUs)."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ...; null leaves it to transformers."""
    device_map: str | dict[str, int | str] | None = None
    """null puts the whole model on `device`; auto spreads it over GPUs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never taken from a recorded run."""
    architecture: dict[str, Any] = {}
    """For `plan`, where the model's files are not: fields of its transformers config, `model_type` and `_name_or_path`
    (whose they are) among them."""
    random_config: dict[str, int | float | bool] = {}
    """Only for `random:FAMILY`: fields of the family's transformers config."""
