"""LISA: full fine-tuning of a few randomly drawn layers at a time (https://arxiv.org/abs/2403.17919)."""

import logging
import random
from typing import Any

from transformers import TrainerCallback

from qlora_exp.models.trained import layers_of, train_layers

log = logging.getLogger(__name__)


class SampledLayers(TrainerCallback):
    """Draw the layers to train every so many steps; what is outside the layers is always trained.

    The draw depends only on the seed and the step, so that a resumed run continues with the same layers. The states of
    layers that are no longer trained are dropped, which keeps the optimizer as small as the paper counts it: a layer
    that is drawn again starts with new ones.
    """

    def __init__(self, model: Any, count: int, interval: int, seed: int) -> None:
        self._model, self._count, self._interval, self._seed = model, count, interval, seed
        self._layers = layers_of(model.get_decoder())
        self._draw: int | None = None

    def layers(self, step: int) -> list[int]:
        """Return the numbers of the layers that are trained in a step, counted from 0."""
        numbers = random.Random(f"{self._seed} {step // self._interval}")
        return sorted(numbers.sample(range(len(self._layers)), self._count))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the layers, also after a checkpoint was loaded."""
        self._draw = None
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Draw other layers if it is time."""
        if state.global_step // self._interval == self._draw:
            return
        self._draw = state.global_step // self._interval
        chosen = self.layers(state.global_step)
        log.info("from step %d on the layers %s are trained", state.global_step + 1, ", ".join(map(str, chosen)))
        train_layers(self._model, chosen)
        states = getattr(optimizer, "optimizer", optimizer).state  # inside accelerate's
        for number, layer in enumerate(self._layers):
            for parameter in layer.parameters() if number not in chosen else ():
                parameter.grad = None
                states.pop(parameter, None)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count all layers as trained: all may have been."""
        train_layers(self._model, range(len(self._layers)))
