"""Wrap TRL's SFTTrainer: build it from the config of a run, in one process or several.

`watcher` observes it while it trains. This module does not use MLflow.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl.trainer.sft_trainer import SFTTrainer

from qlora_exp.config.plugins import BUILT_IN
from qlora_exp.config.schema import Config
from qlora_exp.data.columns import lengths
from qlora_exp.data.tokenization import IGNORED, for_training
from qlora_exp.distributed import group
from qlora_exp.environment import turns
from qlora_exp.environment.device import Resolved
from qlora_exp.environment.efficiency import FlopCounter
from qlora_exp.environment.memory import MemoryMonitor
from qlora_exp.environment.ranks import ranks
from qlora_exp.libraries import accelerate, deepspeed, trl
from qlora_exp.models import transformers_4
from qlora_exp.models.adapters import (
    allocates,
    keep_dtypes,
    penalty,
    save_trained_only,
    saved_parameters,
)
from qlora_exp.models.base import keep_router_setting
from qlora_exp.models.sharding import zero3
from qlora_exp.models.sharding.fsdp import is_sharded, save_whole_states, shard, whole_weights
from qlora_exp.models.sharing.rows import Rows
from qlora_exp.training import batches
from qlora_exp.training.arguments import arguments
from qlora_exp.training.callbacks import Allocation, EarlyStopping, Recomputation
from qlora_exp.training.checkpoints import seal
from qlora_exp.training.lisa import SampledLayers
from qlora_exp.training.optimizers import KeepTrainableSet, chosen_optimizer
from qlora_exp.training.plugins.user_losses import Loss
from qlora_exp.training.plugins.user_losses import load as load_loss
from qlora_exp.training.watcher import Log, Watcher
from qlora_exp.utils.processes.signals import checkpoint_first

log = logging.getLogger(__name__)


class Trainer(SFTTrainer):
    """SFTTrainer that counts tokens and FLOPs and marks memory phases."""

    def __init__(
        self,
        *args: Any,
        memory: MemoryMonitor,
        token_loss: Loss | None = None,
        sources: Sequence[str] = (),
        padding: str = "batch",
        **kwargs: Any,
    ) -> None:
        self.memory = memory
        self._padding, self._multiple = padding, kwargs["args"].pad_to_multiple_of or 1
        self.token_loss = token_loss
        """Loss of an installed package to train by; None for TRL's own."""
        self._sources = sources  # of each held-out row; empty if there is one
        self.seen: Any = torch.zeros(4, dtype=torch.long)
        """Numbers of tokens, supervised tokens, rows, and positions (tokens and padding)."""
        self.counts_flops = False
        """Whether to count the operations of the current step."""
        self.counted: list[tuple[float, int, int]] = []
        """Operations, positions and supervised tokens of each batch whose operations were counted."""
        self._heldout: list[torch.Tensor] = []  # sums over the tokens of each row of an evaluation
        self._router_loss = torch.zeros(2, dtype=torch.double)
        """The router's part of the losses since they were logged last, summed over the steps, and their number."""
        self._engine: Any = None  # DeepSpeed's
        self.together: Rows | None = None
        """The jobs with which this one puts its rows through the base; None: alone."""
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, and count its tokens without padding.

        They are counted on the device of the batch, so that the CPU does not wait for the GPU.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        tokens = mask.sum() if mask is not None else ids.new_tensor(ids.numel())
        supervised = (inputs["labels"] != IGNORED).sum()
        rows = ids.new_tensor(batches.count_rows(inputs))
        counts = torch.stack([tokens, supervised, rows, ids.new_tensor(ids.numel())])
        self.seen = self.seen.to(ids.device) + counts * (supervised > 0)  # a batch without loss is a blank one
        if self.together is not None:
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.together.backward(turns.number())
            return loss
        if not self.counts_flops:
            return super().training_step(model, inputs, *args, **kwargs)
        with FlopCounter() as counter:
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.counted.append((counter.flops, ids.numel(), int(supervised)))
        return loss

    def beside_others(self) -> AbstractContextManager[None]:
        """Let batches go through the base with those of the jobs in `together` inside, to train and to evaluate."""
        return self.together.joined(turns.number(), self.model) if self.together else nullcontext()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer; that of a sharded model saves and loads whole states."""
        optimizer = super().create_optimizer(model)
        if is_sharded(self.model) and self._engine is None:
            save_whole_states(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule; a schedule-free optimizer has its own warmup, of `warmup_steps`."""
        assert self.optimizer is not None
        for parameters in self.optimizer.param_groups:
            if "warmup_steps" in parameters:
                parameters["warmup_steps"] = self.args.get_warmup_steps(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def average(self) -> None:
        """Put the weights that a schedule-free optimizer averages into the model; training takes the others back."""
        if callable(switch := getattr(self.optimizer, "eval", None)):
            switch()

    def partition(self, cpu_offload: bool) -> None:
        """Divide the model and the optimizer over the processes, with DeepSpeed's ZeRO-3."""
        optimizer, device = self.create_optimizer(), self.args.device.type
        self._engine = zero3.partition(self.model, optimizer, device, self.args.max_grad_norm, cpu_offload)
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)  # autocast
        self.model_wrapped = self._engine  # the trainer must not wrap it again

    def get_train_dataloader(self) -> Any:
        """Load the rows in batches, each row once in an epoch, however many processes share them."""
        with accelerate.even_shares():
            return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Load the batches of a step, and take the loss off those that only keep a process busy."""
        turns.pass_on()
        loaded, learned = super().get_batch_samples(self._without_blanks(epoch_iterator), num_batches, device)
        return batches.arranged(loaded, self._padding, self._multiple), learned

    def _without_blanks(self, loaded: Iterator[Any]) -> Iterator[Any]:
        rows = cast(Sized, self.train_dataset)
        for batch in loaded:
            if accelerate.is_blank(self.accelerator, len(rows), self.args.per_device_train_batch_size):
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            yield batch

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; in training, add the adapter's penalty to it."""
        scored = partial(self.token_loss.outputs, model) if self.token_loss and model.training else model
        result = super().compute_loss(scored, inputs, return_outputs, *args, **kwargs)
        if not model.training:
            return result
        if self.aux_loss_enabled:
            part = self.router_aux_loss_coef * trl.last_router_loss(self)
            self._router_loss += torch.tensor([part, 1.0]) / self.current_gradient_accumulation_steps
        added = penalty(self.accelerator.unwrap_model(model)) / self.current_gradient_accumulation_steps
        return (result[0] + added, result[1]) if return_outputs else result + added

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss of the language model alone, comparable between runs; TRL logs a router's as `aux_loss`."""
        if "loss" in logs and self.aux_loss_enabled:
            logs["loss"] -= float(self._router_loss[0] / self._router_loss[1])
            self._router_loss.zero_()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out loss, in a memory phase of its own; the random state (for dropout) does not change."""
        devices = [torch.cuda.current_device()] if self.args.device.type == "cuda" else []
        with self.memory.phase("evaluation"), torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        """Keep the loss of each row of a batch for `evaluation_loop`.

        It is the loss that the evaluation after training measures: without the loss of a router, in nats, not DFT's.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        positions = inputs.get("position_ids")
        sums = partial(torch.sum, dim=1) if positions is None else partial(batches.sums_of_rows, positions)
        rows = torch.stack([*map(sums, (-outputs.log_probs.float(), outputs.is_top1, outputs.label_mask))], 1).double()
        # Of all processes, without the rows that accelerate repeats so that each gets as many.
        self._heldout.append(self.accelerator.gather_for_metrics(rows).cpu())
        return rows[:, 0].sum() / rows[:, 2].sum(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Measure the held-out loss as the mean over tokens, of all rows and of each source.

        Transformers' own is a mean over batches, which depends on how rows are put into batches.
        """
        self._heldout = []
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        rows = torch.cat(self._heldout)
        nll, correct, tokens = rows.sum(dim=0).tolist()
        output.metrics.update({"eval_loss": nll / tokens, "eval_token_accuracy": correct / tokens})
        for source in sorted({*self._sources}):
            nll, _, tokens = rows[[name == source for name in self._sources]].sum(dim=0).tolist()
            output.metrics[f"eval_source_loss/{source}"] = nll / tokens
        return output

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:  # transformers 5.23; no public hook for a sampler
        """Keep the order of held-out rows, by which `evaluation_loop` knows the source of each."""
        return SequentialSampler(eval_dataset) if self._sources else super()._get_eval_sampler(eval_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # transformers 5.23; no public hook for a sampler
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        tokens = np.minimum(lengths(cast(Dataset, self.train_dataset)), cast(Any, self.args).max_length).tolist()
        return batches.ByLength(together, tokens, self.args.data_seed or 0)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # transformers 5.23; no public hook before a step
        """Skip the epoch if training is to stop: the trainer would check that only after another step."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _defer_fsdp_gradient_reduction(self) -> Any:  # transformers 5.23; it needs its own config of the model
        """Reduce the gradients of a sharded model after each batch: whole ones would have to stay in memory."""
        return nullcontext()

    def _clip_grad_norm(self, model: Any) -> Any:  # transformers 5.23; no public hook
        return None if self._engine is not None else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:  # transformers 5.23; no public hook
        """Return the norm of the gradients; DeepSpeed clips them and updates the parameters in the same call."""
        return super()._get_grad_norm(model, grad_norm) if self._engine is None else zero3.step(self._engine)

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:  # transformers 5.23; no public hook
        """Save a sharded model as a whole, and checkpoints with the names of transformers 4 too."""
        if is_sharded(self.model):
            state_dict = whole_weights(self.model, saved_parameters(self.model))
            if not self.args.should_save:
                return
        save_trained_only(self.model)
        super()._save(output_dir, state_dict)
        if (folder := Path(str(output_dir))).name.startswith(PREFIX_CHECKPOINT_DIR):
            transformers_4.add_old_names(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:  # transformers 5.23; no public hook
        if self.optimizer is not None and is_sharded(self.model) and not self.args.should_save:
            self.optimizer.state_dict()  # gathers the main process's
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:  # transformers 5.23; no public hook before a save
        with self.memory.phase("save"):
            folder = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self.average()
            super()._save_checkpoint(*args, **kwargs)
            group.wait()  # each process saves its random state
            if self.args.should_save:
                seal(folder)

    def _load_best_model(self) -> None:  # transformers 5.23; no public hook before it
        """Load the best checkpoint; a schedule-free optimizer must not move its weights afterwards."""
        self.average()
        super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL's would contain paths of this machine, and MLflow has the facts about the run."""


def build(
    model: Any,
    tokenizer: Any,
    train_tokens: Dataset,
    heldout_tokens: Dataset,
    config: Config,
    resolved: Resolved,
    output_dir: Path,
    memory: MemoryMonitor,
    sources: Sequence[str] = (),
) -> Trainer:
    """Build a trainer for a model that already has its trainable parameters; their dtypes are not changed.

    `sources` are the sources of the held-out rows, one a row, whose losses are to be measured; empty: none.
    """
    if config.distributed.engine == "deepspeed_zero3":
        deepspeed.library(resolved.device)  # before accelerate imports it
    trl.score_supervised_tokens_only()
    callbacks: list[TrainerCallback] = []
    if patience := config.training.early_stopping_patience:
        callbacks.append(EarlyStopping(patience, config.training.early_stopping_threshold))
    if allocates(model):
        callbacks.append(Allocation(model))
    if resolved.recomputed_layers:
        callbacks.append(Recomputation(model, resolved.recomputed_layers))
    settings = arguments(config, resolved, output_dir)
    trl.name_experts(model.config.get_text_config())
    with keep_dtypes(model), keep_router_setting(model):
        trainer = Trainer(
            memory=memory,
            token_loss=None if config.training.loss_type in BUILT_IN["loss"] else load_loss(config.training.loss_type),
            padding=resolved.padding,
            model=model,
            args=settings,
            train_dataset=for_training(train_tokens, None if settings.packing else config.training.max_length),
            eval_dataset=heldout_tokens.select_columns(["input_ids", "labels"]),
            sources=sources,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    if settings.activation_offloading and settings.gradient_checkpointing:
        trl.offload_one_at_a_time(trainer)
    if config.distributed.engine == "fsdp":
        shard(model, resolved.device, config.distributed.cpu_offload)
        trainer.is_distributed_loading_by_transformers = True  # the trainer must not wrap it again
    trainer.optimizer = chosen_optimizer(model, config.optimizer, settings)
    if config.distributed.engine == "deepspeed_zero3":
        trainer.partition(config.distributed.cpu_offload)
    trainer.remove_callback(PrinterCallback)  # prints raw dictionaries
    trainer.add_callback(KeepTrainableSet(model))
    method = config.method
    if method.lisa_activated_layers and method.lisa_interval_steps:
        sampled = SampledLayers(model, method.lisa_activated_layers, method.lisa_interval_steps, config.seed)
        trainer.add_callback(sampled)  # after the one that trains all again
    return trainer


def train(
    trainer: Trainer, log: Log, checkpoint: Path | None = None, judge: Callable[[float, int], None] | None = None
) -> dict[str, float]:
    """Train to the end, from `checkpoint` if there is one.

    If training had already ended at that checkpoint, its weights are loaded, or those of the best checkpoint before it.

    Args:
        trainer: the trainer that `build` returned.
        log: function that gets the curves and their step.
        checkpoint: folder of the checkpoint to resume from.
        judge: function that is called with each held-out loss and its step, and may raise.

    Returns:
        The number of `steps`; `train_loss`, the mean over all steps up to the last logged one, those of earlier
        processes too; `final_train_loss`, the last logged one; if this process trained any step, the throughput.

    Raises:
        DivergedError: a loss or a gradient norm is not finite.
    """
    is_own = checkpoint is not None and checkpoint.parent.resolve() == Path(trainer.args.output_dir or "").resolve()
    watcher = Watcher(trainer, log, judge, replays=is_own)
    trainer.add_callback(watcher)
    with (
        trainer.memory.phase("load"),
        closing(watcher),
        trainer.beside_others(),
        # Other processes, or jobs that take turns, would not know that this one stops.
        checkpoint_first() if ranks().size == 1 and turns.current() is None else nullcontext(),
    ):  # loads the checkpoint; `watcher` opens the later phases
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
        measured = any(line["step"] == state.global_step and "eval_loss" in line for line in state.log_history)
        # An earlier process was interrupted after its last checkpoint and before the evaluation of that epoch.
        if trainer.args.eval_strategy == "epoch" and not measured:
            trainer.evaluate()
        trainer.average()
    step_metrics = {"train_loss": result.training_loss, **watcher.throughput()} if watcher.step_seconds else {}
    return {"steps": state.global_step, **step_metrics, **_losses(state.log_history)}


def _losses(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of the logged losses, each of the steps since the one before, and the last; empty if none."""
    losses = [(line["step"], line["loss"]) for line in history if "loss" in line]
    steps = np.diff([0, *(step for step, _ in losses)])
    if not losses:
        return {}
    mean = float(np.average([loss for _, loss in losses], weights=steps))
    return {"train_loss": mean, "final_train_loss": losses[-1][1]}
