"""Build TRL's training arguments from the config of a run."""

from pathlib import Path
from typing import Any

from trl.trainer.sft_config import SFTConfig

from qlora_exp.config.plugins import BUILT_IN
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import sft_arguments
from qlora_exp.config.tables.optimizers import OWN
from qlora_exp.environment.device import Resolved
from qlora_exp.models.adapters import LEAVES_UNUSED

_NOT_AS_SET = frozenset(
    {
        "activation_offloading",
        "assistant_only_loss",  # these two decide the labels, which `data.tokenization` writes
        "completion_only_loss",
        "bf16",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "loss_type",
        "per_device_train_batch_size",
        "resume_from_checkpoint",  # an argument of the trainer's method `train`
    }
)
"""Keys of `training` with the name of an argument that TRL does not get as the user set it."""
_SAME = [name for name, key in sft_arguments.OWN_KEYS.items() if key == f"training.{name}" and name not in _NOT_AS_SET]
"""Keys of `training` that TRL gets as they are: those in `_OF_TRAINING` of `config.tables.sft_arguments` but these."""


class _Arguments(SFTConfig):
    """TRL's arguments in a process that may see several GPUs, while a run uses one.

    Transformers counts all visible GPUs, and would wrap the model in `nn.DataParallel`, which TRL refuses.
    """

    @property
    def n_gpu(self) -> int:
        """Number of GPUs to copy the model to: at most 1, also if `model.device_map` spreads one copy over several."""
        return min(1, super().n_gpu)


class _ShardedArguments(_Arguments):
    """TRL's arguments for a model that stays on the CPU until it is sharded: whole, it may be larger than a GPU."""

    @property
    def place_model_on_device(self) -> bool:
        """Whether the trainer moves the model to the GPU."""
        return False


def as_text(settings: dict[str, Any]) -> str | None:
    """Return settings of an optimizer in the form that transformers reads; None if there are none."""
    return ",".join(f"{name}={value}" for name, value in settings.items()) or None


def arguments(config: Config, resolved: Resolved, output_dir: Path) -> SFTConfig:
    """Return TRL's arguments of the run; all choices that TRL would make by itself are made here."""
    training, zero3 = config.training, config.distributed.engine == "deepspeed_zero3"
    kind = _ShardedArguments if config.distributed.shards else _Arguments
    given = {name: value for name, value in training.sft_config.items() if value is not None}
    recomputing = {"use_reentrant": False, **given.pop("gradient_checkpointing_kwargs", {})}
    decided: dict[str, Any] = dict(
        output_dir=str(output_dir),
        **{name: getattr(training, name) for name in _SAME},
        loss_type=training.loss_type if training.loss_type in BUILT_IN["loss"] else "nll",  # see `user_losses`
        optim="adamw_torch" if resolved.optim in OWN else resolved.optim,
        optim_args=None if resolved.optim in OWN else as_text(config.optimizer.optim_args),
        adam_beta1=config.optimizer.adam_beta1,
        adam_beta2=config.optimizer.adam_beta2,
        adam_epsilon=config.optimizer.adam_epsilon,
        per_device_train_batch_size=resolved.per_device_train_batch_size,
        gradient_accumulation_steps=resolved.gradient_accumulation_steps,
        bf16=resolved.bf16,
        fp16=resolved.fp16,
        activation_offloading=resolved.activation_offloading,
        gradient_checkpointing=resolved.gradient_checkpointing,
        gradient_checkpointing_kwargs=recomputing if resolved.gradient_checkpointing else None,
        use_cpu=resolved.device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        metric_for_best_model="eval_loss" if training.load_best_model_at_end else None,
        dataset_kwargs={"skip_prepare_dataset": not training.packing},  # see `tokenization.for_training`
        eval_packing=False,  # the held-out loss is that of single rows
        logging_nan_inf_filter=False,  # the filter would log the last finite loss and hide a divergence
        report_to="none",
        disable_tqdm=True,  # `Watcher` shows the progress bar
        ddp_find_unused_parameters=config.method.peft_type in LEAVES_UNUSED,  # else it would wait for their gradients
        # DeepSpeed's ZeRO-3 has no `no_sync`: it reduces gradients after each batch.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} if zero3 else None,
        dataloader_pin_memory=resolved.device == "cuda",
    )
    return kind(**decided | given)
