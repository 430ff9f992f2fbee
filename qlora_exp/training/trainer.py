"""Wrap TRL's SFTTrainer: build it from the config of a run, and observe it while it trains.

It measures steps, passes curves to a `log` function, marks memory phases, and stops a run that diverged.
This module does not use MLflow.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl.trainer.sft_trainer import SFTTrainer

from qlora_exp.config.schema import Config
from qlora_exp.data.tokenization import IGNORED
from qlora_exp.environment.device import Resolved
from qlora_exp.environment.efficiency import FlopCounter
from qlora_exp.environment.memory import MemoryMonitor
from qlora_exp.libraries import trl
from qlora_exp.models.adapters import allocates, fit_schedule, keep_dtypes, penalty
from qlora_exp.models.base import keep_router_setting
from qlora_exp.training.arguments import arguments
from qlora_exp.training.checkpoints import seal
from qlora_exp.training.optimizers import KeepTrainableSet, lora_optimizer
from qlora_exp.utils.errors import DivergedError

log = logging.getLogger(__name__)

Log = Callable[[dict[str, float], int], None]

# Our names for values that the trainer logs under a less clear name.
_CURVES = {"eval_loss": "eval/loss", "eval_token_accuracy": "eval/token_accuracy"}
_SKIPPED = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
_COUNTED_STEPS = frozenset(2**power for power in range(2, 32))
"""Steps whose operations are counted, besides the first: few, because counting takes time."""


class _ByLength(LengthGroupedSampler):
    """Sampler that groups rows of similar length, in an order that depends only on the seed and the epoch.

    So a resumed run continues in the same order. The sampler of transformers draws the order from the global random
    state, which differs in a resumed run.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Seed the order of an epoch; accelerate calls this before each epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class Trainer(SFTTrainer):
    """SFTTrainer that counts tokens and FLOPs and marks memory phases."""

    def __init__(self, *args: Any, memory: MemoryMonitor, **kwargs: Any) -> None:
        self.memory = memory
        self.seen: Any = torch.zeros(4, dtype=torch.long)
        """Numbers of tokens, supervised tokens, sequences, and positions (tokens and padding)."""
        self.counts_flops = False
        """Whether to count the operations of the current step."""
        self.counted: list[tuple[float, int, int]] = []
        """Operations, positions and supervised tokens of each batch whose operations were counted."""
        self._heldout = torch.zeros(3, dtype=torch.double)  # sums over the tokens of an evaluation
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, and count its tokens without padding.

        They are counted on the device of the batch, so that the CPU does not wait for the GPU.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        tokens = mask.sum() if mask is not None else ids.new_tensor(ids.numel())
        supervised = (inputs["labels"] != IGNORED).sum()
        counts = torch.stack([tokens, supervised, ids.new_tensor(len(ids)), ids.new_tensor(ids.numel())])
        self.seen = self.seen.to(ids.device) + counts
        if not self.counts_flops:
            return super().training_step(model, inputs, *args, **kwargs)
        with FlopCounter() as counter:
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.counted.append((counter.flops, ids.numel(), int(supervised)))
        return loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss; in training, add the adapter's penalty to it."""
        result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        if not model.training:
            return result
        added = penalty(self.accelerator.unwrap_model(model)) / self.current_gradient_accumulation_steps
        return (result[0] + added, result[1]) if return_outputs else result + added

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out loss, in a memory phase of its own; the random state (for dropout) does not change."""
        devices = [torch.cuda.current_device()] if self.args.device.type == "cuda" else []
        with self.memory.phase("evaluation"), torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        """Add the loss of a batch to the sums of `evaluation_loop`.

        It is the loss that the evaluation after training measures: without the loss of a router, in nats, not DFT's.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        sums = [-outputs.log_probs.float().sum(dim=1), outputs.is_top1.sum(dim=1), outputs.label_mask.sum(dim=1)]
        self._heldout = self._heldout + torch.stack([part.cpu().double().sum() for part in sums])
        return sums[0].sum() / sums[2].sum(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Measure the held-out loss as the mean over tokens.

        Transformers' own is a mean over batches, which depends on how rows are put into batches.
        """
        self._heldout = torch.zeros(3, dtype=torch.double)
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        nll, correct, tokens = self._heldout.tolist()
        output.metrics.update({"eval_loss": nll / tokens, "eval_token_accuracy": correct / tokens})
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # transformers 5.23; no public hook for a sampler
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return _ByLength(sampler.batch_size, sampler.lengths, self.args.seed)
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # transformers 5.23; no public hook before a step
        """Skip the epoch if training is to stop: the trainer would check that only after another step."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:  # transformers 5.23; no public hook before a save
        with self.memory.phase("save"):
            folder = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            super()._save_checkpoint(*args, **kwargs)
            if self.args.should_save:
                seal(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL's would contain paths of this machine, and MLflow has the facts about the run."""


class _Allocation(TrainerCallback):
    """Let the method (AdaLoRA, AdaMSS) reallocate its parameter budget after each optimizer step.

    This comes before the gradients are cleared, because the method needs them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        fit_schedule(self._model, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._model.base_model.update_and_allocate(state.global_step)


class _EarlyStopping(EarlyStoppingCallback):
    """Early stopping of transformers; a resumed run continues its count, and does not train if it had stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def _curves(logs: Mapping[str, Any]) -> dict[str, float]:
    return {
        _CURVES.get(name, f"train/{name}"): float(value)
        for name, value in logs.items()
        if name not in _SKIPPED and isinstance(value, int | float)
    }


class Watcher(TrainerCallback):
    """Callback that times steps, logs curves, shows a progress bar, and raises at a value that is not finite."""

    def __init__(
        self, trainer: Trainer, log: Log, judge: Callable[[float, int], None] | None = None, replays: bool = False
    ) -> None:
        self.step_seconds: list[float] = []
        self.step_counts: list[list[int]] = []
        """Numbers of tokens, supervised tokens, sequences and positions of each step."""
        self.untimed: list[int] = [0]
        """Indices of the steps that rates leave out: the first allocates and warms up, others count operations."""
        self._trainer = trainer
        self._log = log
        self._judge = judge
        self._replays = replays
        self._bar: tqdm | None = None
        self._steady, self._first_step = ExitStack(), ExitStack()
        self._seen: Any = trainer.seen
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; the first step, which allocates memory, is a memory phase of its own.

        Stop at once if the checkpoint already contains all steps: the trainer itself does not check that. If the
        checkpoint is of this run, its curves are logged again: a power failure may have removed them from the journal.
        """
        for line in state.log_history if self._replays else ():
            if "train_runtime" not in line:
                self._log(_curves({key: value for key, value in line.items() if key != "step"}), line["step"])
        trl.set_trained_tokens(self._trainer, max((line.get("num_tokens", 0) for line in state.log_history), default=0))
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
        if control.should_training_stop:
            log.info("training had ended at step %d of %d: nothing is left to do", state.global_step, state.max_steps)
            return
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None)
        self._steady.enter_context(self._trainer.memory.phase("steady"))
        self._first_step.enter_context(self._trainer.memory.phase("first_step"))
        self._trainer.counts_flops = not args.torch_compile
        self._restart()

    def _restart(self) -> None:
        self._seen = self._trainer.seen
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the duration of the step, including the loading of its data."""
        # `tolist` waits until the GPU has finished this step.
        self.step_counts.append((self._trainer.seen - self._seen.to(self._trainer.seen.device)).tolist())
        self.step_seconds.append(time.perf_counter() - self._mark)
        self._first_step.close()
        if self._bar is not None:
            self._bar.update()
        if self._trainer.counts_flops:
            self.untimed.append(len(self.step_seconds) - 1)
        can_count = bool(self._trainer.counted) and math.isfinite(self._trainer.counted[-1][0])
        self._trainer.counts_flops = can_count and state.global_step + 1 in _COUNTED_STEPS
        self._restart()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Restart the clock, so that evaluation does not count as part of the next step."""
        self._restart()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Restart the clock, so that saving does not count as part of the next step."""
        self._restart()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Log the curves, and call `judge` with a new held-out loss.

        Raises:
            DivergedError: a loss or a gradient norm is not finite.
        """
        logs = logs or {}
        if "train_runtime" in logs:  # the trainer's summary at the end; `throughput` replaces it
            return
        curves = _curves(logs)
        if self.step_seconds and "loss" in logs:
            curves["train/step_seconds"] = self.step_seconds[-1]
            curves["train/tokens_per_second"] = self.step_counts[-1][0] / self.step_seconds[-1]
        self._log(curves, state.global_step)
        # Under fp16 a gradient that overflows is no divergence: the step is skipped and the loss scale lowered.
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise DivergedError(f"{name} is {logs[name]} at step {state.global_step}")
        if self._judge is not None and "eval_loss" in logs:
            self._judge(logs["eval_loss"], state.global_step)
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            if self._bar.disable:  # without a terminal, log lines replace the bar
                log.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, logs["loss"])

    def close(self) -> None:
        """End the memory phases and remove the progress bar, also after a failure."""
        self._first_step.close()
        self._steady.close()
        if self._bar is not None:
            self._bar.close()

    def throughput(self) -> dict[str, float]:
        """Return rates over all steps but those in `untimed`; empty if there are no others."""
        timed = [step for step in range(len(self.step_seconds)) if step not in self.untimed]
        if not timed:
            return {}
        seconds = [self.step_seconds[step] for step in timed]
        total = sum(seconds)
        counts = zip(*(self.step_counts[step] for step in timed), strict=True)
        tokens, supervised, sequences, positions = (sum(numbers) for numbers in counts)
        flops = _flops(self._trainer.counted, positions, supervised)
        arithmetic = {} if math.isnan(flops) else {"flops_per_second": flops / total}
        return {
            "step_seconds_p50": float(np.median(seconds)),
            "step_seconds_mean": total / len(seconds),
            "tokens_per_second": tokens / total,
            "supervised_tokens_per_second": supervised / total,
            "samples_per_second": sequences / total,
            **arithmetic,
        }


def _flops(counted: Sequence[tuple[float, int, int]], positions: int, supervised: int) -> float:
    """Estimate the operations of all steps from those of some batches; NaN if they could not be counted.

    The layers take operations for each position, padding included; the output layer for each supervised token.
    """
    if not counted or not all(math.isfinite(flops) for flops, *_ in counted):
        return math.nan
    flops, *sizes = np.array(counted, dtype=float).T
    used = 2 if len(counted) > 2 else 1  # too few batches tell positions from supervised tokens by chance only
    per_size = np.linalg.lstsq(np.stack(sizes[:used], axis=1), flops)[0]
    return float(per_size @ [positions, supervised][:used])


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
    """Build a trainer for a model that already has its trainable parameters; their dtypes are not changed."""
    trl.score_supervised_tokens_only()
    callbacks: list[TrainerCallback] = []
    if config.training.early_stopping_patience:
        callbacks.append(
            _EarlyStopping(config.training.early_stopping_patience, config.training.early_stopping_threshold)
        )
    if allocates(model):
        callbacks.append(_Allocation(model))
    settings = arguments(config, resolved, output_dir)
    with keep_dtypes(model), keep_router_setting(model):
        trainer = Trainer(
            memory=memory,
            model=model,
            args=settings,
            optimizers=(lora_optimizer(model, config.optimizer, settings), None),
            train_dataset=train_tokens.select_columns(["input_ids", "labels"]),
            eval_dataset=heldout_tokens.select_columns(["input_ids", "labels"]),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)  # prints raw dictionaries
    trainer.add_callback(KeepTrainableSet(model))
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
        processes too; if this process trained any step, the throughput.

    Raises:
        DivergedError: a loss or a gradient norm is not finite.
    """
    is_own = checkpoint is not None and checkpoint.parent.resolve() == Path(trainer.args.output_dir or "").resolve()
    watcher = Watcher(trainer, log, judge, replays=is_own)
    trainer.add_callback(watcher)
    with trainer.memory.phase("load"), closing(watcher):  # loads the checkpoint; `watcher` opens the later phases
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
        measured = any(line["step"] == state.global_step and "eval_loss" in line for line in state.log_history)
        # An earlier process was interrupted after its last checkpoint and before the evaluation of that epoch.
        if trainer.args.eval_strategy == "epoch" and not measured:
            trainer.evaluate()
    step_metrics = {"train_loss": result.training_loss, **watcher.throughput()} if watcher.step_seconds else {}
    return {"steps": state.global_step, **step_metrics, **_mean_loss(state.log_history)}


def _mean_loss(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the logged losses, each the mean of the steps since the one before; empty if there are none."""
    losses = [(line["step"], line["loss"]) for line in history if "loss" in line]
    steps = np.diff([0, *(step for step, _ in losses)])
    return {"train_loss": float(np.average([loss for _, loss in losses], weights=steps))} if losses else {}
