"""Build the optimizer of a run, if transformers would not: PEFT's for LoRA, and those of `own_optimizers`.

Of the trainer, this module needs only the arguments that choose an optimizer.
"""

from typing import Any

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.models.adapters import set_trainable, trainable_set
from qlora_exp.training import own_optimizers


def chosen_optimizer(model: Any, config: OptimizerConfig, arguments: TrainingArguments) -> torch.optim.Optimizer | None:
    """Return the run's optimizer; None leaves it to the trainer.

    Raises:
        ConfigError: the optimizer has no matrix to work on.
    """
    own = own_optimizers.build(model, config, arguments.learning_rate, arguments.weight_decay)
    return lora_optimizer(model, config, arguments) if own is None else own


def lora_optimizer(model: Any, config: OptimizerConfig, arguments: TrainingArguments) -> torch.optim.Optimizer | None:
    """Return the optimizer that `lora_optimizer` names; None leaves the choice to the trainer.

    LoRA+: https://arxiv.org/abs/2402.12354, LoRA-FA: https://arxiv.org/abs/2308.03303 (freezes every A), Riemannian
    preconditioning: https://arxiv.org/abs/2402.02347.
    """
    if config.lora_optimizer is None:
        return None
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    decay = arguments.weight_decay
    if config.lora_optimizer == "loraplus":
        return create_loraplus_optimizer(
            model, kind, loraplus_lr_ratio=config.loraplus_lr_ratio, loraplus_weight_decay=decay, **settings
        )
    if config.lora_optimizer == "riemannian":
        return create_riemannian_optimizer(model, kind, reg=config.riemannian_reg, weight_decay=decay, **settings)
    lora = model.peft_config[model.active_adapter]
    optimizer = create_lorafa_optimizer(model, lora.r, lora.lora_alpha, settings["lr"], decay)
    for group in optimizer.param_groups:  # PEFT 0.21's function has no arguments for these two
        group.update(betas=settings["betas"], eps=settings["eps"])
    optimizer.register_load_state_dict_post_hook(move_states)
    return optimizer


class KeepTrainableSet(TrainerCallback):
    """Train the same parameters after a checkpoint was loaded as before: PEFT then trains all of the adapter."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._trained = trainable_set(model)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Restore the set, after the trainer has loaded a checkpoint and before its first step."""
        set_trainable(self._model, self._trained)


def move_states(optimizer: torch.optim.Optimizer) -> None:
    """Move LoRA-FA's states to the devices of their parameters.

    LoRA-FA keeps its states by parameter name; torch moves only states that are kept by parameter.
    """
    devices = {
        name[: name.find("lora")] + "lora" if "lora" in name else name: parameter.device
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for name, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(name, str) and isinstance(value, torch.Tensor):
                state[key] = value.to(devices[name])
