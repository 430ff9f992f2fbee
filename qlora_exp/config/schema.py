"""The config of one run, made of the sections in `sections/`.

The sections declare every key with its type, default, range and meaning; no other place does. A key that mirrors a
library's field has that field's name. Settings of `method` and `lora_variant` are PEFT's own, checked by
`peft_methods`; `crosschecks` checks that sections fit together. This module must not import torch or anything that
imports it: a wrong config is rejected within a second.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from qlora_exp.config.sections.base import Section
from qlora_exp.config.sections.dataset import DatasetConfig, UnrelatedConfig
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.config.sections.method import LoraVariantConfig, MethodConfig
from qlora_exp.config.sections.mixture import REPLAY, MixtureConfig
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.config.sections.sweep import SearchConfig, SweepConfig, TuningConfig
from qlora_exp.config.sections.tracking import TrackingConfig
from qlora_exp.config.sections.training import TrainingConfig
from qlora_exp.config.tables import compatibility


class Config(Section):
    """Config of one run."""

    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    lora_variant: LoraVariantConfig = LoraVariantConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dataset: MixtureConfig = MixtureConfig()
    training: TrainingConfig = TrainingConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    unrelated: UnrelatedConfig = UnrelatedConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: SweepConfig = SweepConfig()
    search: SearchConfig = SearchConfig()
    tuning: TuningConfig = TuningConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Random seed of the run: adapter initialization, order of training rows, dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, else mps (except with bitsandbytes, which does not run there), else cpu."""

    @property
    def datasets(self) -> list[DatasetConfig]:
        """Every dataset that the run reads."""
        return [part for part in (*self.dataset.parts.values(), self.unrelated) if part.paths]

    @property
    def sections_of_rows(self) -> dict[str, DatasetConfig]:
        """Every dataset that the run may read, by the key of its section: `dataset.sources.NAME` for a source."""
        sources = {f"dataset.sources.{name}": part for name, part in self.dataset.parts.items()}
        return (sources if self.dataset.sources else {"dataset": self.dataset}) | {"unrelated": self.unrelated}

    @property
    def parts(self) -> dict[str, DatasetConfig]:
        """The datasets that are trained on, by name: those of `dataset`, and what is replayed."""
        replays = isinstance(self.dataset, MixtureConfig) and self.dataset.replay  # a copy may have a part in its place
        return self.dataset.parts | ({REPLAY: self.unrelated} if replays else {})

    @property
    def peft_settings(self) -> dict[str, Any]:
        """PEFT settings of `method` and `lora_variant` together."""
        return {**self.method.settings, **self.lora_variant.settings}

    @property
    def lora_start(self) -> str | None:
        """How LoRA is initialized (`init_lora_weights`); None for PEFT's default."""
        start = self.peft_settings.get("init_lora_weights")
        return start if isinstance(start, str) else None

    @property
    def new_start(self) -> str | None:
        """How this run initializes LoRA; None for PEFT's default, and if it trains on from an adapter."""
        return None if self.model.adapter else self.lora_start

    @property
    def cannot_train(self) -> str:
        """Beginning of the messages that refuse the run's method on its model."""
        variant = "" if self.lora_variant.name == "lora" else f" lora_variant={self.lora_variant.name}"
        return f"method={self.method.name}{variant} cannot train {self.model.model_name_or_path}"

    @property
    def depends_on_batch(self) -> bool:
        """Whether the method's own rules look at the rows of a batch, or of a process."""
        return any(compatibility.differs(*self._tested_as, engine) for engine in compatibility.ENGINES)

    def refusal(self, aspect: str) -> str | None:
        """Return why `aspect` of training fails with this method on this base; None if no test found it to fail."""
        return compatibility.refusal(*self._tested_as, aspect)

    @property
    def _tested_as(self) -> tuple[str, str]:
        """Kind of method and kind of base, as the verdicts list them."""
        stored = self.quantization
        other = stored.quant_method if stored.quantized else "plain"
        base = "4bit" if stored.load_in_4bit else "8bit" if stored.load_in_8bit else other
        return compatibility.kind_of(self.method.kind, self.lora_variant.name), base
