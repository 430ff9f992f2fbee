"""Choose which of a model's own parameters are trained, without an adapter: all, those of some layers, or some by name.

Of the config this module needs only the sections `method` and `optimizer`.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_exp.config.sections.method import MethodConfig, names_in
from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.config.tables.optimizers import PROJECTED
from qlora_exp.models.targets import count_kinds, is_within, linear_targets, parts_without_text, roles
from qlora_exp.utils.errors import ConfigError, did_you_mean


def layers_of(model: Any) -> list[torch.nn.Module]:
    """Return the decoder's layers: the module list with the most modules in it.

    Not the longest one: a layer may have a list of more experts than there are layers.
    """
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return [*max(lists, key=lambda layers: len([*layers.modules()]))]


def recompute_first(model: Any, count: int) -> None:
    """Let only the first layers recompute their activations, of a model in which all do.

    Their activations are needed last in a backward pass, when those of the others are gone.

    Raises:
        ConfigError: the model has fewer layers, or recomputes in another way than layer by layer.
    """
    layers = layers_of(model)
    if not can_recompute_some(layers):
        raise ConfigError("training.recomputed_layers: this model cannot recompute some of its layers: leave it out")
    if count > len(layers):
        raise ConfigError(f"training.recomputed_layers={count}: this model has {len(layers)} layers")
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count  # type: ignore[assignment]


def can_recompute_some(layers: Sequence[torch.nn.Module]) -> bool:
    """Return whether these layers of a model recompute their activations each for itself."""
    return all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def freeze(model: Any, method: MethodConfig) -> None:
    """Train only what `trainable_layers` and `unfrozen_parameters` name; change nothing if neither is set.

    Tied weights are one parameter: naming one of them trains both.

    Raises:
        ConfigError: the model has fewer layers, or a name matches none of its parameters that text passes through.
    """
    if not method.freezes:
        return
    chosen = {id(parameter) for layer in _layers(model, method.trainable_layers) for parameter in layer.parameters()}
    apart = parts_without_text(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in method.unfrozen_parameters:
        matches = names_in(pattern).fullmatch
        matching = [name for name in named if matches(name) and not is_within(name, apart)]
        if not matching:
            kinds = count_kinds(name for name in named if not is_within(name, apart))
            parts = sorted({part for kind in kinds for part in kind.split(".")} - {"*"})
            raise ConfigError(
                f"method.unfrozen_parameters: '{pattern}' matches no parameter that text passes through"
                f"{did_you_mean(pattern, parts)} This model has {', '.join(kinds)}"
            )
        chosen |= {id(named[name]) for name in matching}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _layers(model: PreTrainedModel, count: int | None) -> list[torch.nn.Module]:
    """Return so many last layers of the model; of a negative number so many first ones."""
    if count is None:
        return []
    layers = layers_of(model.get_decoder())
    if abs(count) > len(layers):
        raise ConfigError(f"method.trainable_layers={count}: this model has {len(layers)} layers")
    return layers[-count:] if count > 0 else layers[:-count]


def train_layers(model: Any, numbers: Collection[int]) -> None:
    """Train the decoder's layers with these numbers, counted from 0, and freeze its others."""
    for number, layer in enumerate(layers_of(model.get_decoder())):
        layer.requires_grad_(number in numbers)


def sample_last(model: Any, method: MethodConfig) -> None:
    """Train what LISA trains at a time, for a plan: of all draws the last layers' needs most memory.

    Their gradients are there first, while all activations still are. Other methods change nothing.
    """
    if (count := method.lisa_activated_layers) is not None:
        depth = len(layers_of(model.get_decoder()))
        train_layers(model, range(depth - count, depth))


def described(model: torch.nn.Module) -> str:
    """Describe what is trained: names with the numbers of layers, `layers.*.mlp.up_proj.weight (28, 29)`, then others.

    Names of tied weights are joined: `lm_head.weight = model.embed_tokens.weight`.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    tied = [" = ".join(sorted(same)) for same in names.values() if len(same) > 1]
    layers: dict[str, set[int]] = {}
    others = []
    for same in names.values():
        if len(same) > 1:
            continue
        if match := re.fullmatch(r"(.*?)\.(\d+)\.(.*)", same[0]):
            layers.setdefault(f"{match[1]}.*.{match[3]}", set()).add(int(match[2]))
        else:
            others.append(same[0])
    parts = [f"{kind} ({', '.join(map(str, sorted(numbers)))})" for kind, numbers in layers.items()]
    return ", ".join([*parts, *others, *tied])


def projected_weights(model: Any, config: OptimizerConfig) -> list[str]:
    """Return the names of the trained matrices whose gradients GaLore or APOLLO projects.

    Raises:
        ConfigError: `optim_target_modules` matches no linear layer, or none that is trained.
    """
    assert config.optim_target_modules is not None
    trained = dict(model.named_parameters())
    names = [f"{name}.weight" for name in linear_targets(config.optim_target_modules, model)]
    if not (weights := [name for name in names if name in trained and trained[name].requires_grad]):
        raise ConfigError(
            f"optimizer.optim_target_modules={config.optim_target_modules}: none of these layers is trained: name "
            "others, or use optimizer=adamw_torch"
        )
    return weights


def inner_matrices(model: Any) -> list[str]:
    """Return the names of the trained matrices inside the layers, for Muon: not embeddings, nor the output layer.

    Raises:
        ConfigError: there are none.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        tables.add(id(head.weight))
    matrices = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) not in tables
    ]
    if not matrices:
        raise ConfigError("optimizer=muon: no matrix inside the layers is trained: use optimizer=adamw_torch")
    return matrices


def adam_mini_blocks(model: Any) -> tuple[dict[str, str], int]:
    """Choose the parts of parameters that share a learning rate in Adam-mini, by what each parameter is for.

    As its paper does (https://arxiv.org/abs/2406.16793): a head of queries or keys; a row of another matrix, so a token
    of a table and a neuron of the rest; a whole norm; and a single value of a bias.

    Returns:
        head, row, whole or value for the name of each trained parameter, and the number of weights of a head (0: none
        is trained).

    Raises:
        ConfigError: a trained parameter is none of these, or heads have several sizes, for which the optimizer's
            package has no blocks.
    """
    kinds = {"query": "head", "key": "head", "value": "row", "output": "row", "mlp": "row"}
    layers, head = roles(model), model.get_output_embeddings()
    blocks: dict[str, str] = {}
    sizes: set[int] = set()
    unknown = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        kind = kinds.get(layers.get(owner, ""), "")
        if leaf == "bias" and parameter.ndim == 1:
            kind = "value"
        elif "norm" in type(module).__name__.lower():
            kind = "whole"
        elif isinstance(module, torch.nn.Embedding) or module is head:
            kind = "row"
        elif not isinstance(module, torch.nn.Linear) or leaf != "weight":  # Conv1D has its rows in columns
            kind = ""
        if kind == "head":
            size = getattr(model.get_submodule(owner.rpartition(".")[0]), "head_dim", 0)
            kind = kind if isinstance(size, int) and size > 0 and len(parameter) % size == 0 else ""
            sizes |= {size * parameter.shape[1]} if kind else set()
        blocks[name] = kind
        unknown += [] if kind else [name]
    if unknown or len(sizes) > 1:
        why = f"{', '.join(count_kinds(unknown))} have neither" if unknown else "its heads have several sizes"
        raise ConfigError(
            "optimizer=adam_mini has a learning rate for each head of queries and keys and for each row of separate "
            f"matrices, which does not fit this model: {why}. Use optimizer=adamw_torch, muon or adamw_torch_8bit"
        )
    return blocks, max(sizes, default=0)


def check_tables(model: PreTrainedModel) -> None:
    """Check that the embedding and the output layer are trained, as new tokens need it.

    Raises:
        ConfigError: one of them is not.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    frozen = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(module is table for table in tables) and not module.weight.requires_grad
    ]
    if frozen:
        raise ConfigError(
            f"model.new_tokens: {' and '.join(frozen)} are not trained, so that new tokens would not learn: add "
            f"{', '.join(frozen)} to method.unfrozen_parameters, or use method=full"
        )


def check_trained(model: PreTrainedModel, method: MethodConfig, optimizer: OptimizerConfig) -> None:
    """Check on a model without values, which is changed, that the config names parameters that it has.

    Raises:
        ConfigError: it does not.
    """
    freeze(model, method)
    if (count := method.lisa_activated_layers) is not None and count > (depth := len(layers_of(model.get_decoder()))):
        raise ConfigError(f"method.lisa_activated_layers={count}: this model has {depth} layers")
    if optimizer.optim in PROJECTED:
        projected_weights(model, optimizer)
    elif optimizer.optim == "muon":
        inner_matrices(model)
    elif optimizer.optim == "adam_mini":
        adam_mini_blocks(model)
