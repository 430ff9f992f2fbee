"""Section `model`: the base model."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from qlora_exp.config.sections.base import Dtype, Section, check_location

_MOST_TOKENS, _LONGEST_TOKEN = 1000, 64


class ModelConfig(Section):
    """The base model."""

    model_name_or_path: str = "embedded:smollm2-135m"
    """Hub id, local folder, `embedded:smollm2-135m` (built-in), or `random:FAMILY`: a tiny random model of one of
    the families in docs/reference/families.md, such as llama or qwen3_moe."""
    adapter: str | None = None
    """Adapter of this base to train on from: id, run key or name of the run that saved it, `models:/NAME/VERSION`, or a
    folder. Its method, rank and other settings must be set as that run had them. null: a new adapter."""
    new_tokens: list[str] = []
    """Texts that become one token each, such as [<tool>,</tool>]. Their embeddings begin as the mean of those of the
    tokens that the text consisted of, and are trained: by full fine-tuning with all others, by LoRA alone."""
    revision: str | None = None
    """Hub models: branch, tag or commit. null: the default branch."""
    dtype: Literal["auto"] | Dtype = "auto"
    """Data type of the base weights. auto: float32 on a CPU and for full fine-tuning, else bfloat16 (float16 on a GPU
    without bfloat16)."""
    attn_implementation: str | None = None
    """Attention implementation: eager, sdpa, flash_attention_2, ... null: transformers chooses."""
    device_map: str | dict[str, int | str] | None = None
    """Where the layers go. null: all on `device`; auto: spread over the GPUs. With `distributed` each process has a
    device of its own, and auto is as null."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never taken over from a recorded run."""
    architecture: dict[str, Any] = {}
    """For `plan` only, if the model's files are not on this machine: fields of its transformers config, including
    `model_type` and `_name_or_path` (the model that they describe)."""
    random_config: dict[str, int | float | bool] = {}
    """Only with `random:FAMILY`: fields of the family's transformers config."""

    @field_validator("new_tokens")
    @classmethod
    def _are_tokens(cls, texts: list[str]) -> list[str]:
        if len(texts) > _MOST_TOKENS:
            raise ValueError(f"has {len(texts)} tokens; at most {_MOST_TOKENS} can be added")
        for text in texts:
            if not text or text != text.strip() or len(text) > _LONGEST_TOKEN or not text.isprintable():
                raise ValueError(
                    f"{text!r:.100} is no token: 1 to {_LONGEST_TOKEN} printable characters, without blanks at the ends"
                )
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"has {', '.join(twice)} twice")
        return texts

    @field_validator("architecture")
    @classmethod
    def _asks_for_no_code(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Refuse what makes transformers fetch code or kernels: only a key of its own may ask for that."""
        for name, value in fields.items():
            if (name.startswith("_") and name != "_name_or_path") or name.endswith(("auto_map", "_implementation")):
                raise ValueError(f"{name} is no size of a model; leave it out")
            if isinstance(value, dict):
                cls._asks_for_no_code(value)
        return fields

    _location = field_validator("model_name_or_path", "adapter")(check_location)

    @property
    def from_hub(self) -> bool:
        """Whether the model is neither built in nor a local folder."""
        name = self.model_name_or_path
        return not name.startswith(("embedded:", "random:")) and not Path(name).expanduser().is_dir()
