"""Add bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) to PEFT, which does not have them.

Importing this module registers them with PEFT under the type `BOTTLENECK`, for training and for loading. The names of
settings are from LLM-Adapters' PEFT (https://arxiv.org/abs/2304.01933). Does not depend on the rest of this package.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from qlora_exp.libraries.peft import add_peft_type

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass
class BottleneckConfig(PeftConfig):
    """PEFT's config of bottleneck adapters.

    The settings are described by their `help`, as PEFT's are.
    """

    bottleneck_size: int = field(
        default=64, metadata={"help": "Number of features between the down- and the up-projection."}
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = field(
        default="gelu", metadata={"help": "Activation function between the two projections."}
    )
    adapter_dropout: float = field(default=0.0, metadata={"help": "Dropout after the activation function."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers whose output goes through an adapter. In Houlsby's paper, they are the last layers of each "
            "attention and each MLP block, before the residual connection."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out of target_modules: names, or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and to save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK  # type: ignore[attr-defined]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A layer y = f(x), replaced by y + up(dropout(activation(down(y)))).

    It starts near the identity function. As in the paper, weights are drawn from a normal distribution with standard
    deviation 0.01, truncated at two standard deviations. Biases start at zero.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.between = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter."""
        features: Any = self.get_base_layer().out_features
        down, up = nn.Linear(features, config.bottleneck_size), nn.Linear(config.bottleneck_size, features)
        for layer in (down, up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        activation = _ACTIVATIONS[config.non_linearity]()
        self.between[adapter_name] = nn.Sequential(activation, nn.Dropout(config.adapter_dropout))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the adapted output of the base layer: (..., out_features), in the dtype of that output."""
        result = self.base_layer(x, *args, **kwargs)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                added = up(self.between[name](down(result.to(down.weight.dtype))))
                result = result + added.to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError: a function that is not linear cannot be merged into a weight."""
        raise ValueError("bottleneck adapters have a non-linearity, so they cannot be merged into the base's weights")


class BottleneckModel(BaseTuner):
    """PEFT's tuner of bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not hasattr(target, "out_features"):
            raise ValueError(
                f"{current_key}: a bottleneck adapter follows a linear layer, not a {type(target).__name__}"
            )
        layer = BottleneckLayer(target, adapter_name, peft_config)  # type: ignore[arg-type]
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


if "BOTTLENECK" not in PeftType.__members__:
    add_peft_type("BOTTLENECK")
    register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
