"""Train by a loss of an installed package.

A loss is a function of the log-probabilities of the learned tokens, a tensor of one dimension. It returns the loss of
each, a tensor of the same shape. Padding, prompts, packing, gradient accumulation and several processes are no concern
of it: TRL's trainer divides the sum by the number of learned tokens of the whole step, as it does for its own losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_exp.config import plugins
from qlora_exp.config.plugins import Facts, Plugin
from qlora_exp.utils.errors import ConfigError, type_and_first_line


@dataclass(frozen=True)
class Loss:
    """A loss, imported and tried out."""

    plugin: Plugin
    function: Callable[..., torch.Tensor]
    asks_for_entropy: bool
    """Whether it takes `entropy` too, that of the model's distribution at each learned token, in nats."""

    @property
    def facts(self) -> Facts:
        """What is known of it."""
        return self.plugin.facts

    def __call__(self, log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token.

        Raises:
            ConfigError: the loss does not return a tensor with a value for each token.
        """
        losses = self.function(log_probs, **({"entropy": entropy} if self.asks_for_entropy else {}))
        if not isinstance(losses, torch.Tensor) or losses.shape != log_probs.shape:
            returned = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ConfigError(
                f"{self.plugin} must return a tensor with the loss of each token, of the shape of log_probs, "
                f"{tuple(log_probs.shape)}; it returned {returned}"
            )
        return losses

    def outputs(self, model: Any, **inputs: Any) -> Any:
        """Run the model; the log-probabilities of its outputs are replaced by the negative loss of each token.

        TRL's trainer takes their negative sum as the loss.
        """
        outputs = model(**inputs)
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is not None and (mask := outputs.label_mask).any():  # else they are zero, and so is the loss
            losses = self(log_probs[mask], outputs.entropy[mask])
            outputs.log_probs = torch.zeros_like(log_probs).masked_scatter(mask, -losses.to(log_probs.dtype))
        return outputs


def load(name: str) -> Loss:
    """Import a loss and try it out on three tokens.

    Raises:
        ConfigError: it is not installed, cannot be imported, or does not give a finite loss and gradient.
    """
    plugin = plugins.find("loss", name)
    function, taken = plugin.function(("log_probs",), ("entropy",))
    loss = Loss(plugin, function, "entropy" in taken)
    log_probs = torch.tensor([-1e-4, -1.0, -12.0], requires_grad=True)
    entropy = torch.tensor([1e-3, 1.5, 6.0], requires_grad=True)
    try:
        losses = loss(log_probs, entropy)
        gradients = torch.autograd.grad(losses.sum(), (log_probs, entropy), allow_unused=True)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # it may raise anything
        raise ConfigError(f"{plugin} fails on three tokens: {type_and_first_line(error)}") from error
    known = [gradient for gradient in gradients if gradient is not None]
    if not torch.isfinite(torch.stack([losses.detach(), *known])).all():
        raise ConfigError(f"{plugin} gives a loss or gradient that is not finite, for log_probs {log_probs.tolist()}")
    if not any(gradient.any() for gradient in known):
        raise ConfigError(f"{plugin} has no gradient: nothing would be learned")
    return loss
