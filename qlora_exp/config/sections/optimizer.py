"""The section `optimizer`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_exp.config.sections.base import Section


class OptimizerConfig(Section):
    """Fields of transformers' TrainingArguments that choose the optimizer."""

    name: str = "adamw_torch"
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adamw_bnb_8bit",
        "sgd",
        "adafactor",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "rmsprop",
        "adagrad",
    ] = "adamw_torch"
    """A paged optimizer falls back to the same one without paging where the device has no paging; that is recorded."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    lora_optimizer: Literal["loraplus", "lorafa", "riemannian"] | None = None
    """What PEFT makes of `optim` for LoRA. lorafa is an AdamW of its own."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 16.0
    """loraplus: the learning rate of LoRA's B is this times that of A."""
    riemannian_reg: Annotated[float, Field(gt=0)] = 0.01
    """riemannian: damping of the preconditioner."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora_optimizer == "lorafa" and self.optim != "adamw_torch":
            raise ValueError("lora_optimizer=lorafa is an AdamW of its own: leave optim=adamw_torch")
        return self
