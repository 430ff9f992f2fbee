"""What a config may say: its sections (`sections/`), each with every key's type, default, range and meaning.

Keys are declared there and nowhere else. A key that mirrors a library's field has that field's name. Settings of
`method` and `lora_variant` are PEFT's own, checked by `peft_methods`; what goes together is checked by `crosschecks`.
This module must not import torch or anything that does: a wrong config is refused within a second.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from qlora_exp.config import compatibility
from qlora_exp.config.sections.base import Section
from qlora_exp.config.sections.dataset import DatasetConfig, UnrelatedConfig
from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.config.sections.method import LoraVariantConfig, MethodConfig
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.config.sections.sweep import SearchConfig, SweepConfig
from qlora_exp.config.sections.tracking import TrackingConfig
from qlora_exp.config.sections.training import TrainingConfig


class Config(Section):
    """One run."""

    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    lora_variant: LoraVariantConfig = LoraVariantConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dataset: DatasetConfig = DatasetConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    unrelated: UnrelatedConfig = UnrelatedConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: SweepConfig = SweepConfig()
    search: SearchConfig = SearchConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @property
    def datasets(self) -> list[DatasetConfig]:
        """Every dataset that the run reads."""
        return [one for one in (self.dataset, self.unrelated) if one.paths]

    @property
    def peft_settings(self) -> dict[str, Any]:
        """PEFT's settings of the method and of the variant of LoRA together."""
        return {**self.method.settings, **self.lora_variant.settings}

    @property
    def lora_start(self) -> str | None:
        """How LoRA starts (`init_lora_weights`), if not as PEFT's default."""
        start = self.peft_settings.get("init_lora_weights")
        return start if isinstance(start, str) else None

    def refusal(self, aspect: str) -> str | None:
        """Why `aspect` of training is known to fail with this method on this base; None if it is not."""
        stored = self.quantization
        other = stored.quant_method if stored.quantized else "plain"
        base = "4bit" if stored.load_in_4bit else "8bit" if stored.load_in_8bit else other
        kind = compatibility.kind_of(self.method.peft_type, self.lora_variant.name)
        return compatibility.refusal(kind, base, aspect)
