"""Check the settings of optimizers (`optim_args`) and the packages that they need, without importing torch.

Of the config this module needs only the section `optimizer`.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from qlora_exp.config.tables import declared_types
from qlora_exp.utils.errors import ConfigError

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]
_Sides = Literal["std", "reverse_std", "right", "left"]
_PROJECTED = {"rank": PositiveInt, "update_proj_gap": PositiveInt, "scale": _Positive}
_FEW_BITS = {"block_size": PositiveInt, "bf16_stochastic_round": bool}
_AVERAGED = {"r": _NotNegative, "weight_lr_power": _NotNegative}

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": _Momentum, "dampening": _NotNegative, "nesterov": bool},
    "rmsprop": {"momentum": _Momentum, "alpha": _Momentum, "eps": _Positive, "centered": bool},
    "adagrad": {"lr_decay": _NotNegative, "eps": _Positive},
    "adamw_torch_8bit": _FEW_BITS,
    "adamw_torch_4bit": _FEW_BITS,
    "galore_adamw": {**_PROJECTED, "proj_type": _Sides},
    "apollo_adamw": {
        **_PROJECTED,
        "proj_type": _Sides,
        "proj": Literal["random", "svd"],
        "scale_type": Literal["channel", "tensor"],
    },
    "schedule_free_adamw": _AVERAGED,
    "schedule_free_radam": _AVERAGED,
    "schedule_free_sgd": {**_AVERAGED, "momentum": Annotated[float, Field(gt=0, lt=1)]},
    "stable_adamw": {"decouple_lr": bool, "kahan_sum": bool},
    "adam_mini": {},
    "muon": {
        "momentum": _Momentum,
        "nesterov": bool,
        "ns_steps": Annotated[int, Field(ge=1, lt=100)],
        "adjust_lr_fn": Literal["original", "match_rms_adamw"],
    },
}
"""Settings of each optimizer that has some, by the names that transformers or the optimizer's package gives them."""
PROJECTED = ("galore_adamw", "apollo_adamw")
"""Optimizers that keep states of projected gradients, for the weights in `optim_target_modules`."""
WHOLE = (*PROJECTED, "adam_mini")
"""Optimizers that need the rows and columns of a model's own matrices, not those of an adapter."""
SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd")
COMPILED = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Optimizers of torchao, which compiles their steps."""
OWN = (*COMPILED, *PROJECTED, *SCHEDULE_FREE, "stable_adamw", "adam_mini", "muon")
"""Optimizers that `training.own_optimizers` builds."""
_PACKAGES = {
    **dict.fromkeys(COMPILED, ("torchao", "quantizers")),
    "galore_adamw": ("galore_torch", "galore"),
    "apollo_adamw": ("apollo_torch", "apollo"),
    **dict.fromkeys(SCHEDULE_FREE, ("schedulefree", "schedule-free")),
    "stable_adamw": ("optimi", "optimi"),
    "adam_mini": ("adam_mini", "adam-mini"),
}
"""Module that an optimizer is imported from, and the extra of this package that installs it."""


def check_package(optim: str) -> None:
    """Check that the package that an optimizer needs is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    module, extra = _PACKAGES.get(optim, ("", ""))
    if module and find_spec(module) is None:
        raise ConfigError(f"optimizer.optim={optim} needs an extra package: pip install 'qlora-exp[{extra}]'")


def problems(optim: str, given: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each of the given settings that the optimizer does not have, or whose value does not fit."""
    yield from declared_types.problems("optim_args", f"optim={optim}", SETTINGS.get(optim, {}), given)
    if given.get("nesterov") and optim == "sgd" and (not given.get("momentum") or given.get("dampening")):
        yield "optim_args.nesterov needs optim_args.momentum above 0, and no dampening"
