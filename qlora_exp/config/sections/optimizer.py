"""Section `optimizer`: the optimizer and its settings."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_exp.config.sections.base import Section
from qlora_exp.config.tables import optimizers


class OptimizerConfig(Section):
    """The optimizer: fields of transformers' TrainingArguments, and PEFT's optimizers for LoRA."""

    name: str = "adamw_torch"
    """Label of the optimizer in tables."""
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
        "adamw_torch_8bit",
        "adamw_torch_4bit",
        "galore_adamw",
        "apollo_adamw",
        "schedule_free_adamw",
        "schedule_free_radam",
        "schedule_free_sgd",
        "stable_adamw",
        "adam_mini",
        "muon",
    ] = "adamw_torch"
    """Name in transformers, or muon (torch's) or adam_mini. Without paging on the device, a paged optimizer runs
    non-paged; the run records it."""
    optim_args: dict[str, int | float | bool | str] = {}
    """Settings of `optim`, by transformers' names: rank, update_proj_gap, scale and proj_type of galore_adamw, and so
    on. A setting that `optim` does not have is rejected with the list of those it has."""
    optim_target_modules: str | list[str] | None = None
    """galore_adamw and apollo_adamw: linear layers whose gradients they project, as method.target_modules names them:
    all-linear (without the output layer), attention, mlp, q_v, a list of names, or a regular expression."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the running mean of the gradients (Adam's first moment), per optimizer step."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of the running mean of the squared gradients (Adam's second moment), per optimizer step."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Constant added to the root of the second moment, against division by zero."""
    lora_optimizer: Literal["loraplus", "lorafa", "riemannian"] | None = None
    """PEFT's optimizer for LoRA, which extends `optim`. lorafa replaces it by its own AdamW. null: `optim` alone."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 16.0
    """loraplus: learning rate of LoRA's B divided by the learning rate of A."""
    riemannian_reg: Annotated[float, Field(gt=0)] = 0.01
    """riemannian: damping of the preconditioner."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if wrong := [*optimizers.problems(self.optim, self.optim_args)]:
            raise ValueError("\n".join(f"optimizer.{problem}" for problem in wrong))
        if self.optim in optimizers.PROJECTED and not self.optim_target_modules:
            raise ValueError(f"optim={self.optim} needs optim_target_modules, such as all-linear")
        if self.lora_optimizer and self.optim in optimizers.OWN:
            raise ValueError(f"lora_optimizer={self.lora_optimizer} cannot extend {self.optim}: set optim=adamw_torch")
        if self.lora_optimizer == "lorafa" and self.optim != "adamw_torch":
            raise ValueError("lora_optimizer=lorafa uses its own AdamW: set optim=adamw_torch")
        return self
