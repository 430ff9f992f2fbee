"""Callbacks of the trainer that keep what a method or a resumed run needs."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from qlora_exp.models.adapters import fit_schedule
from qlora_exp.models.trained import recompute_first


class Allocation(TrainerCallback):
    """Let the method (AdaLoRA, AdaMSS) reallocate its parameter budget after each optimizer step.

    This comes before the gradients are cleared, because the method needs them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fit the schedule of the budget to the number of steps."""
        fit_schedule(self._model, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reallocate the budget."""
        self._model.base_model.update_and_allocate(state.global_step)


class Recomputation(TrainerCallback):
    """Let only the first layers recompute, after the trainer has let all."""

    def __init__(self, model: Any, count: int) -> None:
        self._model, self._count = model, count

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Turn recomputation off in the other layers."""
        recompute_first(self._model, self._count)


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping of transformers; a resumed run continues its count, and does not train if it had stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the count of the process before."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
