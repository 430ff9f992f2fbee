"""Observe the trainer while it trains: time its steps, log its curves, and stop a run that diverged."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from qlora_exp.distributed import group
from qlora_exp.environment import turns
from qlora_exp.environment.ranks import hides_bars
from qlora_exp.libraries import trl
from qlora_exp.utils.errors import DivergedError
from qlora_exp.utils.processes import signals

if TYPE_CHECKING:
    from qlora_exp.training.trainer import Trainer

log = logging.getLogger(__name__)

Log = Callable[[dict[str, float], int], None]

# Our names for values that the trainer logs under a less clear name.
_CURVES = {"eval_loss": "eval/loss", "eval_token_accuracy": "eval/token_accuracy"}
_SKIPPED = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
_COUNTED_STEPS = frozenset(2**power for power in range(2, 32))
"""Steps whose operations are counted, besides the first: few, because counting takes time."""


def _name_of_curve(name: str) -> str:
    source = name.removeprefix("eval_source_loss/")
    return _CURVES.get(name, f"train/{name}") if source == name else f"eval/source_loss/{source}"


def _curves(logs: Mapping[str, Any]) -> dict[str, float]:
    return {
        _name_of_curve(name): float(value)
        for name, value in logs.items()
        if name not in _SKIPPED and isinstance(value, int | float)
    }


class Watcher(TrainerCallback):
    """Callback that times steps, logs curves, shows a progress bar, and raises at a value that is not finite."""

    def __init__(
        self, trainer: "Trainer", log: Log, judge: Callable[[float, int], None] | None = None, replays: bool = False
    ) -> None:
        self.step_seconds: list[float] = []
        self.step_counts: list[list[int]] = []
        """Numbers of tokens, supervised tokens, rows and positions of each step."""
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
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=hides_bars()
        )
        self._steady.enter_context(self._trainer.memory.phase("steady"))
        self._first_step.enter_context(self._trainer.memory.phase("first_step"))
        self._trainer.counts_flops = not args.torch_compile
        self._restart()

    def _restart(self) -> None:
        self._seen = self._trainer.seen
        self._mark = turns.seconds()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the duration of the step, including the loading of its data."""
        # `tolist` waits until the GPU has finished this step.
        counts = self._trainer.seen - self._seen.to(self._trainer.seen.device)
        self.step_counts.append(self._trainer.accelerator.reduce(counts, "sum").tolist())
        self.step_seconds.append(turns.seconds() - self._mark)
        self._first_step.close()
        if self._bar is not None:
            self._bar.update()
        if self._trainer.counts_flops:
            self.untimed.append(len(self.step_seconds) - 1)
        can_count = bool(self._trainer.counted) and math.isfinite(self._trainer.counted[-1][0])
        self._trainer.counts_flops = can_count and state.global_step + 1 in _COUNTED_STEPS
        if signals.is_ending():
            control.should_save = control.should_training_stop = True
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
            peaks = self._trainer.memory.of_steps()
            curves |= {f"train/{source}_peak_mib": value for source, value in peaks.items()}
            curves["train/step_seconds"] = self.step_seconds[-1]
            curves["train/tokens_per_second"] = self.step_counts[-1][0] / self.step_seconds[-1]
        self._log(curves, state.global_step)
        # Under fp16 a gradient that overflows is no divergence: the step is skipped and the loss scale lowered.
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise DivergedError(f"{name} is {logs[name]} at step {state.global_step}")
        if self._judge is not None and "eval_loss" in logs:
            group.call_on_main(self._judge, logs["eval_loss"], state.global_step)
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
        tokens, supervised, rows, positions = (sum(numbers) for numbers in counts)
        flops = _flops([*chain(*group.gather(self._trainer.counted))], positions, supervised)
        arithmetic = {} if math.isnan(flops) else {"flops_per_second": flops / total}
        return {
            "step_seconds_p50": float(np.median(seconds)),
            "step_seconds_mean": total / len(seconds),
            "tokens_per_second": tokens / total,
            "supervised_tokens_per_second": supervised / total,
            "samples_per_second": rows / total,
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
