"""The wrapper around TRL's SFTTrainer: its arguments from our config, and what it must tell us while it runs.

Measures steps, feeds curves to a `log` function, marks memory phases, stops a run that diverged.
Knows nothing of MLflow.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qlora_exp.adapters import keep_dtypes
from qlora_exp.data import IGNORED
from qlora_exp.device import Resolved
from qlora_exp.errors import ConfigError
from qlora_exp.memory import MemoryMonitor
from qlora_exp.schema import Config

log = logging.getLogger(__name__)

Log = Callable[[dict[str, float], int], None]

# Keys of TrainingConfig that are SFTConfig's own and need no translation.
_SAME = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "packing",
    "train_sampling_strategy",
    "loss_type",
    "neftune_noise_alpha",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "dataloader_num_workers",
    "torch_compile",
)
# The trainer's names of what it logs, where ours say more.
_CURVES = {"eval_loss": "eval/loss", "eval_mean_token_accuracy": "eval/token_accuracy"}
_SKIPPED = {
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_entropy",
    "eval_num_tokens",
}


class DivergedError(Exception):
    """The loss or the gradient is not a number any more."""


def arguments(config: Config, resolved: Resolved, output_dir: Path) -> SFTConfig:
    """TRL's arguments of the run; every choice it would make by itself is made here."""
    training = config.training
    return SFTConfig(
        output_dir=str(output_dir),
        **{name: getattr(training, name) for name in _SAME},
        optim=resolved.optim,
        adam_beta1=config.optimizer.adam_beta1,
        adam_beta2=config.optimizer.adam_beta2,
        adam_epsilon=config.optimizer.adam_epsilon,
        bf16=resolved.bf16,
        fp16=resolved.fp16,
        gradient_checkpointing=resolved.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if resolved.gradient_checkpointing else None,
        use_cpu=resolved.device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        metric_for_best_model="eval_loss" if training.load_best_model_at_end else None,
        eval_packing=False,  # held-out loss is of the rows themselves
        logging_nan_inf_filter=False,  # it would show the last finite loss instead of a divergence
        report_to="none",
        disable_tqdm=True,  # one progress bar of our own
        dataloader_pin_memory=resolved.device == "cuda",
    )


class Trainer(SFTTrainer):
    """SFTTrainer that counts tokens and tells which memory phase it is in."""

    def __init__(self, *args: Any, memory: MemoryMonitor, **kwargs: Any) -> None:
        self.memory = memory
        self.tokens_seen = 0
        self.supervised_seen = 0
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass, its tokens counted (padding left out)."""
        mask = inputs.get("attention_mask")
        self.tokens_seen += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        self.supervised_seen += int((inputs["labels"] != IGNORED).sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss, in a memory phase of its own; the random state (dropout's) is left as it was."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with self.memory.phase("evaluation"), torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:  # transformers 5.23; no public hook before a save
        with self.memory.phase("save"):
            super()._save_checkpoint(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card names paths of this machine; MLflow holds what a run was."""


class Watcher(TrainerCallback):
    """Step times, curves, the progress bar, and the first bad number."""

    def __init__(self, trainer: Trainer, log: Log) -> None:
        self.step_seconds: list[float] = []
        self.step_tokens: list[int] = []
        self.step_supervised: list[int] = []
        self.step_samples = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        self._trainer = trainer
        self._log = log
        self._bar: tqdm | None = None
        self._first_step: Any = None
        self._seen = (0, 0)
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; the first step, which allocates, is a memory phase of its own."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None)
        self._first_step = self._trainer.memory.phase("first_step")
        self._first_step.__enter__()
        self._restart()

    def _restart(self) -> None:
        self._seen = (self._trainer.tokens_seen, self._trainer.supervised_seen)
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the step's time, loading of its data included."""
        self.step_seconds.append(time.perf_counter() - self._mark)
        self.step_tokens.append(self._trainer.tokens_seen - self._seen[0])
        self.step_supervised.append(self._trainer.supervised_seen - self._seen[1])
        self._end_first_step()
        if self._bar is not None:
            self._bar.update()
        self._restart()

    def _end_first_step(self) -> None:
        if self._first_step is not None:
            self._first_step.__exit__(None, None, None)
            self._first_step = None

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Evaluation is not part of the next step's time."""
        self._restart()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Saving is not part of the next step's time."""
        self._restart()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Pass curves on.

        Raises:
            DivergedError: a loss or a gradient norm is not finite.
        """
        logs = logs or {}
        if "train_runtime" in logs:  # the trainer's closing summary; ours is `throughput`
            return
        curves = {
            _CURVES.get(name, f"train/{name}"): float(value)
            for name, value in logs.items()
            if name not in _SKIPPED and isinstance(value, int | float)
        }
        if self.step_seconds and "loss" in logs:
            curves["train/step_seconds"] = self.step_seconds[-1]
            curves["train/tokens_per_second"] = self.step_tokens[-1] / self.step_seconds[-1]
        self._log(curves, state.global_step)
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise DivergedError(f"{name} is {logs[name]} at step {state.global_step}")
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            if self._bar.disable:  # no terminal: lines instead of a bar
                log.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, logs["loss"])

    def close(self) -> None:
        """Take the progress bar away, also after a failure."""
        self._end_first_step()
        if self._bar is not None:
            self._bar.close()

    def throughput(self) -> dict[str, float]:
        """Rates over all steps but the first, which also allocates and warms up; empty after a single step."""
        seconds, tokens, supervised = self.step_seconds[1:], self.step_tokens[1:], self.step_supervised[1:]
        if not seconds:
            return {}
        total = sum(seconds)
        return {
            "step_seconds_p50": float(np.median(seconds)),
            "step_seconds_mean": total / len(seconds),
            "tokens_per_second": sum(tokens) / total,
            "supervised_tokens_per_second": sum(supervised) / total,
            "samples_per_second": self.step_samples * len(seconds) / total,
        }


def build(
    model: Any,
    tokenizer: Any,
    train_tokens: Dataset,
    heldout_tokens: Dataset,
    config: Config,
    resolved: Resolved,
    output_dir: Path,
    memory: MemoryMonitor,
) -> Trainer:
    """A trainer for a model that already has its trainable parameters; their dtypes stay as they are."""
    callbacks: list[TrainerCallback] = []
    if config.training.early_stopping_patience:
        callbacks.append(
            EarlyStoppingCallback(config.training.early_stopping_patience, config.training.early_stopping_threshold)
        )
    with keep_dtypes(model):
        trainer = Trainer(
            memory=memory,
            model=model,
            args=arguments(config, resolved, output_dir),
            train_dataset=train_tokens.select_columns(["input_ids", "labels"]),
            eval_dataset=heldout_tokens.select_columns(["input_ids", "labels"]),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)  # it prints raw dictionaries
    return trainer


def train(trainer: Trainer, config: Config, log: Log) -> dict[str, float]:
    """Train to the end; the throughput, with `train_loss` averaged over the steps.

    Raises:
        DivergedError: the loss is not a number any more.
        ConfigError: there is no checkpoint where one was to be resumed.
    """
    watcher = Watcher(trainer, log)
    trainer.add_callback(watcher)
    try:
        with trainer.memory.phase("steady"):
            result = trainer.train(resume_from_checkpoint=_checkpoint(config.training.resume_from_checkpoint))
    finally:
        watcher.close()
    return {"train_loss": result.training_loss, "steps": trainer.state.global_step, **watcher.throughput()}


def _checkpoint(path: str | None) -> str | None:
    if path is None or (Path(path) / "trainer_state.json").is_file():
        return path
    newest = get_last_checkpoint(path)
    if newest is None:
        raise ConfigError(f"training.resume_from_checkpoint: no checkpoint in {path}")
    return newest
