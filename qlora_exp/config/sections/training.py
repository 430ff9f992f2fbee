"""The section `training`: fields of TRL's SFTConfig."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from qlora_exp.config.sections.base import Interval, NonNegative, Section


class TrainingConfig(Section):
    """Fields of TRL's SFTConfig, with `auto` where the device or method should choose."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: int = -1
    """Positive: overrides num_train_epochs."""
    per_device_train_batch_size: PositiveInt = 8
    per_device_eval_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Below 1 it is a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0 turns clipping off. The QLoRA paper clips at 0.3."""
    bf16: Literal["auto"] | bool = "auto"
    """Autocast to bfloat16. auto: only on a GPU that has it."""
    fp16: Literal["auto"] | bool = "auto"
    """Autocast to float16. auto: only on a GPU without bfloat16."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. auto: on for a GPU (if the method can), off for a CPU."""
    max_length: PositiveInt = 1024
    """Tokens; longer rows are cut, and the label audit counts them."""
    packing: bool = False
    """Several rows in one sequence, with isolated attention; refused on a model that cannot isolate them."""
    packing_strategy: Literal["bfd", "bfd_split"] = "bfd"
    """Best fit, decreasing: rows longer than max_length are cut, or (bfd_split) go on in another sequence."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    completion_only_loss: bool = True
    """Loss on the answer only; false: on the prompt too."""
    assistant_only_loss: bool = False
    """Loss on every answer of a dialogue, not on the last alone; the chat template needs no generation marks."""
    loss_type: Literal["nll", "dft"] = "nll"
    neftune_noise_alpha: Annotated[float, Field(ge=0)] | None = None
    logging_steps: PositiveInt = 1
    logging_first_step: bool = False
    eval_strategy: Interval = "no"
    eval_steps: PositiveInt | None = None
    save_strategy: Interval = "no"
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt | None = 2
    load_best_model_at_end: bool = False
    """Best by held-out loss."""
    early_stopping_patience: PositiveInt | None = None
    """Evaluations without a better held-out loss before the run stops."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or an output folder whose newest checkpoint is taken."""
    dataloader_num_workers: NonNegative = 0
    torch_compile: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError("max_steps must be positive, or -1 to train for num_train_epochs")
        if self.bf16 is True and self.fp16 is True:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.load_best_model_at_end and (self.eval_strategy == "no" or self.save_strategy != self.eval_strategy):
            raise ValueError("load_best_model_at_end needs eval_strategy and save_strategy to be the same, not 'no'")
        if self.load_best_model_at_end and self.eval_strategy == "steps" and self.save_steps % (self.eval_steps or 1):
            raise ValueError("load_best_model_at_end needs save_steps to be a multiple of eval_steps")
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end=true")
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ValueError("eval_strategy=steps needs eval_steps")
        path = self.resume_from_checkpoint
        if path and not Path(path).is_dir():
            raise ValueError(f"resume_from_checkpoint: no folder {path}")
        return self
