"""Section `training`: fields of TRL's SFTConfig."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from qlora_exp.config.sections.base import Interval, NonNegative, PluginName, Section
from qlora_exp.config.tables import schedules, sft_arguments


class TrainingConfig(Section):
    """Fields of TRL's SFTConfig. `auto` lets the device or the method decide."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Number of optimizer steps; overrides num_train_epochs. -1: train for num_train_epochs."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows of a training batch on each device. One optimizer step learns from per_device_train_batch_size *
    gradient_accumulation_steps * distributed.num_processes rows."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows of a batch when held-out losses are measured, on each device."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose gradients are accumulated for one optimizer step."""
    tune: Literal["auto"] | None = None
    """auto: compute each step in the fastest way that is planned to fit the device: in other batches of the same rows,
    with another padding, with gradient_checkpointing in no, some or all layers and, on a CPU, bf16 (where these are not
    set). Losses change by rounding and by the masks of dropout; `resolved.tuned` says what was chosen. null: as
    configured."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Largest learning rate, after warmup; lr_scheduler_type says how it changes. Adapters take a rate about ten times
    as high as full fine-tuning does: the options of `method` set one for each."""
    lr_scheduler_type: Annotated[
        Literal[
            "linear",
            "cosine",
            "cosine_with_restarts",
            "cosine_with_min_lr",
            "cosine_warmup_with_min_lr",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "warmup_stable_decay",
        ],
        BeforeValidator(schedules.check_name),
    ] = "linear"
    """Shape of the learning rate over the steps, by transformers' names. constant: without warmup."""
    lr_scheduler_kwargs: dict[str, int | float | bool | str] = {}
    """Settings of the schedule, by transformers' names. cosine_with_restarts: num_cycles. cosine_with_min_lr: min_lr or
    min_lr_rate. polynomial: lr_end, power. inverse_sqrt: timescale. warmup_stable_decay: num_decay_steps, decay_type,
    min_lr_ratio."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Steps of learning rate warmup. Below 1: a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the optimizer (in AdamW, apart from the gradient). Biases and norms have none. 0: none."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping: largest norm of the gradient. 0: no clipping. The QLoRA paper clips at 0.3."""
    bf16: Literal["auto"] | bool = "auto"
    """Autocast to bfloat16. auto: only on a GPU that supports it."""
    fp16: Literal["auto"] | bool = "auto"
    """Autocast to float16. auto: only on a GPU without bfloat16."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. auto: on for a GPU (if the method supports it), off for a CPU."""
    activation_offloading: bool = False
    """Keep in the machine's memory, on a GPU, what the backward pass needs: with gradient_checkpointing the inputs of
    layers. They are copied while the GPU computes. For long rows: training=long_rows (docs/how_to/long_rows.md)."""
    tiled_mlp: bool = False
    """Compute the MLPs and norms of rows that are longer than the model's hidden size in tiles of tokens, and again in
    the backward pass. Gradients are the same up to rounding, and the masks of dropout."""
    recomputed_layers: PositiveInt | None = None
    """Number of layers, the first ones, that gradient_checkpointing recomputes. null: all."""
    max_length: PositiveInt = 1024
    """Largest number of tokens in a row. Longer rows are truncated; the label audit counts them."""
    padding: Literal["batch", "by_length", "free"] | None = None
    """How rows of unequal length make batches. batch: each batch is padded to its longest row. by_length: the rows of
    each step of a process are sorted by length before they are divided into its batches, which takes padding off. free:
    the rows of a batch follow one another in one sequence, with isolated attention and no padding. The rows of a step
    and the loss are the same. null: batch, unless tune chooses."""
    packing: bool = False
    """Put several rows into one sequence, with isolated attention. Refused for a model that cannot isolate them."""
    packing_strategy: Literal["bfd", "bfd_split"] = "bfd"
    """Best-fit decreasing. Rows over max_length are truncated (bfd) or continued in another sequence (bfd_split)."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the training rows. group_by_length: rows of similar length together, for less padding."""
    completion_only_loss: bool = True
    """true: loss on the answer only; false: loss on the prompt too."""
    assistant_only_loss: bool = False
    """Loss on every answer of a dialogue, not only on the last or on those of its completion. The chat template needs
    no generation marks."""
    loss_type: PluginName = "nll"
    """nll: negative log-likelihood (cross-entropy); dft: the loss of Dynamic Fine-Tuning; or the name of an installed
    package's loss (docs/how_to/add_a_metric.md). Held-out losses are always nll."""
    neftune_noise_alpha: Annotated[float, Field(ge=0)] | None = None
    """NEFTune: strength of the noise on embeddings during training. null: none."""
    logging_steps: PositiveInt = 1
    """Steps between logged training losses."""
    logging_first_step: bool = False
    """Log the training loss of the first step too, where logging_steps is more than 1."""
    eval_strategy: Interval = "no"
    """When to measure the held-out loss during training. steps: every eval_steps."""
    eval_steps: PositiveInt | None = None
    """Steps between evaluations, with eval_strategy=steps."""
    save_strategy: Interval = "no"
    """When to save a checkpoint. steps: every save_steps."""
    save_steps: PositiveInt = 500
    """Steps between checkpoints, with save_strategy=steps."""
    save_total_limit: PositiveInt | None = 2
    """Number of checkpoints to keep. null: all."""
    load_best_model_at_end: bool = False
    """Load the checkpoint with the lowest held-out loss at the end."""
    early_stopping_patience: PositiveInt | None = None
    """Stop training after this many evaluations without a better held-out loss. null: never."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Decrease of the held-out loss that an evaluation must exceed to count as better."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder, or an output folder, whose newest checkpoint is used."""
    dataloader_num_workers: NonNegative = 0
    """Processes that load training rows. 0: the run's own process loads them."""
    torch_compile: bool = False
    """Compile the model with torch.compile."""
    sft_config: dict[str, Any] = {}
    """Further arguments of TRL's SFTConfig, by its names, such as {label_smoothing_factor: 0.1}. `qlora-exp keys
    training.sft_config` lists them; of the others, `qlora-exp keys training.sft_config.NAME` says why a run does not
    take them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError("max_steps must be positive, or -1 to train for num_train_epochs")
        rate, warmup, steps = self.learning_rate, self.warmup_steps, self.max_steps
        wrong = schedules.problems(self.lr_scheduler_type, self.lr_scheduler_kwargs, rate, warmup, steps)
        if problems := [*(f"training.{problem}" for problem in wrong), *sft_arguments.check(self.sft_config)]:
            raise ValueError("\n".join(problems))
        if self.bf16 is True and self.fp16 is True:
            raise ValueError("bf16 and fp16 exclude each other: set one of them")
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
            raise ValueError(f"resume_from_checkpoint: folder not found: {path}")
        return self
