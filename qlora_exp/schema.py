"""What a config may say: every key with its type, default, range and meaning; what goes together: `crosschecks`.

The only place where a key is declared. A key that mirrors a library's field has that field's name.
Settings of `method` and `lora_variant` are PEFT's own and are checked by `peft_registry`.
This module must not import torch or anything that does: a wrong config is refused within a second.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from qlora_exp import compatibility, crosschecks, peft_registry

Dtype = Literal["float32", "bfloat16", "float16"]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffixes of dataset files, with the names of their readers in `datasets`."""
Interval = Literal["no", "steps", "epoch"]
OTHER_WEIGHTS = {"torchao": ("int8", "float8"), "quanto": ("int8", "float8", "int4", "int2")}
"""What quantizers beside bitsandbytes store a weight as."""


class Section(BaseModel):
    """One section of the config: unknown keys are refused, attribute docstrings document the keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class PeftSettings(Section):
    """A section whose other keys are settings of a PEFT config."""

    model_config = ConfigDict(extra="allow")

    @property
    def settings(self) -> dict[str, Any]:
        """The PEFT settings: every key that this class does not declare."""
        return dict(self.model_extra or {})


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


class MethodConfig(PeftSettings):
    """Which parameters train. Every other key is a setting of the PEFT config named by `peft_type`."""

    name: str = "full"
    peft_type: str | None = None
    """PEFT's own name of the method (LORA, IA3, ...); null trains all parameters."""
    quantized_base: bool | None = None
    """true: needs a quantized base; false: refuses one; null: takes those that it was seen to work on."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the trainable adapter weights, whatever the base. auto: float32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.peft_type is None:
            problems = [f"{name}: a method without peft_type takes no PEFT settings" for name in self.settings]
        else:
            problems = peft_registry.check("method", self.peft_type, self.settings)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class LoraVariantConfig(PeftSettings):
    """How LoRA is scaled, split and initialised. Every other key is a setting of PEFT's LoraConfig."""

    name: str = "lora"
    init_rows: PositiveInt = 64
    """Training rows that EVA, CorDA and LoRA-GA look at to start."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := peft_registry.check("lora_variant", "LORA", self.settings):
            raise ValueError("\n".join(problems))
        return self


class QuantizationConfig(Section):
    """How the frozen base is stored: fields of transformers' BitsAndBytesConfig, TorchAoConfig and QuantoConfig."""

    name: str = "none"
    quant_method: Literal["bitsandbytes", "torchao", "quanto", "gptq", "awq"] = "bitsandbytes"
    """What stores it. gptq, awq: the model's own files are quantized so."""
    weights: Literal["int8", "float8", "int4", "int2"] | None = None
    """torchao (int8, float8) and quanto: what a weight is stored as."""
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    """Quantize the quantization constants too: about 0.4 bits less for each parameter."""
    bnb_4bit_compute_dtype: Literal["auto"] | Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU that has it, else float16."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """int8: activations above it are computed unquantized."""

    @property
    def quantized(self) -> bool:
        """Whether the base is stored in a few bits."""
        return self.bitsandbytes or self.quant_method != "bitsandbytes"

    @property
    def bitsandbytes(self) -> bool:
        """Whether it is stored by bitsandbytes, which does not run on Apple's GPUs."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _check(self) -> Self:
        bnb = self.quant_method == "bitsandbytes"
        if self.load_in_4bit + self.load_in_8bit + (not bnb) > 1:
            raise ValueError("load_in_4bit, load_in_8bit and another quant_method exclude each other")
        possible = OTHER_WEIGHTS.get(self.quant_method)
        if self.weights not in (possible or (None,)):
            told = f"one of {', '.join(possible)}" if possible else "null"
            raise ValueError(f"weights={self.weights}: with quant_method={self.quant_method} it must be {told}")
        return self


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


class DatasetConfig(Section):
    """Which text, in which prompt format, split how."""

    name: str = "construction_faq"
    path: str = "embedded:construction_faq"
    """Hub id, a .jsonl/.json/.csv/.parquet file, `embedded:construction_faq` or `reasoning_gym:TASK`."""
    subset: str | None = None
    """Hub datasets: the configuration name."""
    revision: str | None = None
    split: str = "train"
    eval_path: str | None = None
    """A file with the held-out rows; null splits them off `path`."""
    eval_split: str | None = None
    """A split of `path` with the held-out rows; null splits them off `split`."""
    eval_size: Share | Annotated[int, Field(gt=0, strict=True)] = 0.1
    """Share or number of rows held out when there is no eval_path or eval_split."""
    split_seed: int = 42
    """Seeds the split and the choice of rows, independently of the run's seed."""
    max_train_rows: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None
    format: Literal["alpaca", "chat", "prompt_completion", "text"] = "alpaca"
    """alpaca: Alpaca's two prompts, with and without input; chat: the model's chat template; text: all tokens learn."""
    prompt_column: str = "instruction"
    input_column: str | None = "input"
    """Optional context; appended to the prompt in chat and prompt_completion."""
    completion_column: str = "output"
    messages_column: str | None = None
    """chat: a column of whole dialogues; the last assistant turn is the completion."""
    text_column: str = "text"
    system_message: str | None = None
    """chat: null leaves it to the model's template."""
    drop_matching: str | None = None
    """Regular expression; rows whose completion matches are left out."""
    drop_duplicates: bool = True
    """Keep only the first of rows with the same prompt and input; of dialogues, of those that are wholly the same."""
    drop_leaks: Literal["none", "exact", "near"] = "exact"
    """Training rows to leave out because of a held-out row: exact: with the same prompt; near: with like text too."""
    leak_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of five-word sequences in common from which two rows count as near in the leak report."""
    streaming: bool = False
    """Hub: fetch rows one by one and stop when there are enough: max_train_rows, and the held-out ones of eval_size."""
    reasoning_gym_size: PositiveInt = 500
    """reasoning_gym: rows generated, held-out ones included."""
    reasoning_gym_config: dict[str, int | float | str | bool] = {}
    """reasoning_gym: fields of the task's own config."""

    @property
    def paths(self) -> list[str]:
        """Where rows come from."""
        return [path for path in (self.path, self.eval_path) if path and path != "none"]

    @property
    def files(self) -> list[Path]:
        """Those of `paths` that are local files, whether they are there or not."""
        given = [Path(path) for path in self.paths]
        return [path for path in given if path.suffix in FILE_FORMATS or path.exists()]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.eval_path and self.eval_split:
            raise ValueError("eval_path and eval_split exclude each other")
        if self.system_message and self.format != "chat":
            raise ValueError(f"system_message has no place in format '{self.format}': use format=chat")
        if self.messages_column and self.format != "chat":
            raise ValueError("messages_column needs format=chat")
        if self.streaming and (self.max_train_rows is None or self.eval_size < 1):
            raise ValueError("streaming needs to know when to stop: max_train_rows, and an eval_size in rows")
        return self


class UnrelatedConfig(DatasetConfig):
    """Text that the run is not about: its loss after training less that before is what the run made the model forget.

    The rows that are held out of it are used; keys are those of a dataset.
    """

    name: str = "none"
    path: str = "none"
    """As a dataset's, or `embedded:python_docs`; `none`: forgetting is not measured."""
    format: Literal["alpaca", "chat", "prompt_completion", "text"] = "text"


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


class EvaluationConfig(Section):
    """What is measured on the held-out rows, before and after training."""

    before: bool = True
    """Measure the untrained model too."""
    generate_rows: NonNegative = 16
    """Held-out rows to generate answers for; 0: none."""
    max_new_tokens: PositiveInt = 64
    generation_batch_size: PositiveInt = 8
    metrics: list[Literal["rouge", "exact_match"]] = ["rouge", "exact_match"]
    """Of generated answers against the references. A dataset with its own scorer adds its score."""
    lm_eval_tasks: list[str] = []
    """Tasks and groups of lm-eval-harness, such as mmlu, before and after training."""
    lm_eval_include_path: str | None = None
    """A folder of task files of your own. They can run code: only those you trust."""
    lm_eval_num_fewshot: NonNegative | None = None
    """null: as each task says."""
    lm_eval_limit: PositiveInt | None = None
    """Items of each task; null: all."""


class TrackingConfig(Section):
    """Where MLflow is and what goes there."""

    uri: Annotated[str, Field(min_length=1)] | None = None
    """null: SQLite under ./mlruns; else any MLflow tracking URI."""
    experiment_name: str = "qlora_exp"
    run_name: str | None = None
    """null: made of model, dataset, method, quantization, variant, rank and seed."""
    tags: dict[str, str] = {}
    log_adapter: bool = True
    """Keep the trained adapter in MLflow as a logged model."""
    log_full_model: bool = False
    """The same for a full fine-tune, which is as large as the base model."""
    plan: bool = True
    """Plan the run's memory before it begins (seconds, once for runs alike), to be logged beside what it takes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.uri and urlsplit(self.uri).password:
            raise ValueError(
                "uri: a password there would be kept in files; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or PGPASSWORD for a database) in the environment or in .env"
            )
        return self


class SweepConfig(Section):
    """How a sweep (`-m`) goes about its jobs. Changes no job's result."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """Of its folder and its MLflow run; null: made of the swept keys. The same name again goes on with that sweep."""
    n_jobs: PositiveInt = 1
    """Jobs at once on this machine; they share the cores."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """Of each job."""
    fail_fast: bool = False
    """Start no further job once one has failed."""
    rerun: Literal["none", "failed", "all"] = "none"
    """Which ended jobs to run again, from the start. Those that were cut off always go on."""
    dry_run: bool = False
    """List the jobs and what would happen to each; run nothing."""
    unfit: Literal["run", "skip", "refuse"] = "run"
    """What becomes of jobs that are planned not to fit their device; refuse runs no job if there is one."""
    vram: Annotated[float, Field(gt=0)] | None = None
    """GiB of the GPU that jobs will have, for `unfit`; null: of the device that is here."""


class SearchConfig(Section):
    """How Optuna searches (`hydra/sweeper=optuna`). Changes no job's result."""

    n_trials: PositiveInt = 20
    """Trials of the whole search; a search that was cut off goes on to this number."""
    metrics: Annotated[list[str], Field(min_length=1)] = ["after/loss"]
    """What is optimized, by the names that runs log; several give a Pareto front."""
    directions: list[Literal["minimize", "maximize"]] | None = None
    """One for each metric; null minimizes all."""
    sampler: Literal["tpe", "random"] = "tpe"
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampler."""
    prune: bool = False
    """Stop a job whose held-out loss during training is worse than the median of earlier trials."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.directions and len(self.directions) != len(self.metrics):
            raise ValueError("directions: give one for each of metrics, or null")
        if self.prune and (self.metrics != ["after/loss"] or self.directions == ["maximize"]):
            raise ValueError("prune judges by the held-out loss: it needs metrics=[after/loss], minimized")
        return self


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
    def lora_start(self) -> str | None:
        """How LoRA starts (`init_lora_weights`), if not as PEFT's default."""
        start = {**self.method.settings, **self.lora_variant.settings}.get("init_lora_weights")
        return start if isinstance(start, str) else None

    def refusal(self, aspect: str) -> str | None:
        """Why `aspect` of training is known to fail with this method on this base; None if it is not."""
        stored = self.quantization
        other = stored.quant_method if stored.quantized else "plain"
        base = "4bit" if stored.load_in_4bit else "8bit" if stored.load_in_8bit else other
        kind = compatibility.kind_of(self.method.peft_type, self.lora_variant.name)
        return compatibility.refusal(kind, base, aspect)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := [*crosschecks.problems(self)]:
            raise ValueError("\n".join(problems))
        return self
