"""Units of the keys that have one."""

UNITS = {
    "dataset.eval_size": "rows, or below 1 a share of them",
    "dataset.leak_threshold": "share of five-word sequences",
    "dataset.max_eval_rows": "rows",
    "dataset.max_train_rows": "rows",
    "dataset.reasoning_gym_size": "rows",
    "dataset.replay": "share of training rows",
    "dataset.validation_size": "rows, or below 1 a share of them",
    "distributed.ddp_timeout": "seconds",
    "distributed.num_machines": "machines",
    "distributed.num_processes": "processes",
    "evaluation.generate_rows": "rows",
    "evaluation.generation_batch_size": "rows",
    "evaluation.lm_eval_limit": "items",
    "evaluation.lm_eval_num_fewshot": "examples",
    "evaluation.max_new_tokens": "tokens",
    "lora_variant.init_rows": "rows",
    "method.lisa_activated_layers": "layers",
    "method.lisa_interval_steps": "optimizer steps",
    "method.trainable_layers": "layers",
    "search.n_trials": "trials",
    "sweep.n_jobs": "jobs",
    "sweep.timeout_minutes": "minutes",
    "sweep.vram": "GiB",
    "training.dataloader_num_workers": "processes",
    "training.early_stopping_patience": "evaluations",
    "training.early_stopping_threshold": "nats per token",
    "training.eval_steps": "optimizer steps",
    "training.gradient_accumulation_steps": "batches",
    "training.learning_rate": "per optimizer step",
    "training.logging_steps": "optimizer steps",
    "training.max_grad_norm": "L2 norm of all gradients",
    "training.max_length": "tokens",
    "training.max_steps": "optimizer steps",
    "training.num_train_epochs": "epochs",
    "training.per_device_eval_batch_size": "rows",
    "training.per_device_train_batch_size": "rows",
    "training.recomputed_layers": "layers",
    "training.save_steps": "optimizer steps",
    "training.save_total_limit": "checkpoints",
    "training.sft_config.ddp_bucket_cap_mb": "MB",
    "training.sft_config.pad_to_multiple_of": "tokens",
    "training.sft_config.torch_empty_cache_steps": "optimizer steps",
    "training.warmup_steps": "optimizer steps, or below 1 a share of them",
    "tuning.n_trials": "trials",
}
"""Unit by key; keys of `unrelated` have that of `dataset`."""


def unit(key: str) -> str:
    """Return the unit of a key; empty if it has none."""
    return UNITS.get(key.replace("unrelated.", "dataset.", 1), "")
