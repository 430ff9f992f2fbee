"""Choose the modules that an adapter changes: by preset, name or regular expression, checked against the model."""

import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel

from qlora_exp.config.patterns import fault
from qlora_exp.config.tables.peft_methods import PRESETS
from qlora_exp.models.files import NO_MODULE, no_module
from qlora_exp.utils.errors import ConfigError, did_you_mean

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|\bff\b|\bfc|moe|expert|intermediate|output", re.IGNORECASE)
_ROUTER = re.compile(r"(.*_)?gate|router")
_OUTPUT = re.compile(r"(o|out|c|down)_proj|wo|w2|fc2|fc_out|dense|dense_4h_to_h")
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)\b)")
_QUERY, _KEY, _VALUE = (re.compile(rf"({names})(_proj|_lin)?") for names in ("q|query|wq", "k|key|wk", "v|value|wv"))


def resolve_targets(wanted: str | list[str], model: PreTrainedModel) -> str | list[str]:
    """Return target modules that PEFT matches to what was asked for, and to nothing else.

    `attention`, `mlp`, `q_v` and `outputs` (the last layers of attention and MLP blocks) become the shortest names that
    PEFT, which compares the ends of names, finds in these layers only: `q_proj`, but `attn.c_proj` in GPT-2, whose MLP
    has a `c_proj` too. Layers that text does not pass through (in a model of text and images), and those whose adapters
    would be bypassed (in a state-space model), are never adapted.

    Args:
        wanted: a preset, a regular expression, or a list of names.
        model: the base model; its weights are not used.

    Raises:
        ConfigError: a name, preset or regular expression matches no module that text passes through.
    """
    names = [name for name, _ in model.named_modules() if name]
    apart, bypassed, routers = parts_without_text(model), {*bypassed_layers(model)}, _routers(model)
    linear = [name for name in linear_layers(model) if name not in bypassed]
    if wanted == "all-linear":
        return shortest_names(linear, model) if apart or bypassed or routers else wanted
    if isinstance(wanted, str) and wanted in PRESETS:
        if not (chosen := _preset(wanted, model, linear)):
            raise ConfigError(_no_match(wanted, model, linear))
        return shortest_names(chosen, model)
    matched: set[str] = set()
    if not wanted:
        return wanted  # with target_parameters only
    for target in [wanted] if isinstance(wanted, str) else wanted:
        matching = {*_matching("method.target_modules", target if wanted == target else _ends_with(target), names)}
        if not matching:
            raise ConfigError(_no_match(target, model, linear, is_item=isinstance(wanted, list)))
        matched |= matching
    if never := sorted(matched & bypassed):
        raise ConfigError(
            f"method.target_modules: {wanted} matches {', '.join(count_kinds(never))}, whose weights the block around "
            "it reads without calling the layer, so that an adapter there would be bypassed; adapt others: all-linear "
            "leaves them out"
        )
    kept = {name for name in matched if not is_within(name, apart)}
    if not kept:
        raise ConfigError(
            f"method.target_modules: {wanted} matches only modules that text does not pass through "
            f"({', '.join(apart)}), which would not learn; choose others, such as attention or all-linear"
        )
    return wanted if kept == matched else shortest_names(kept, model)


def _matching(setting: str, pattern: str, names: Iterable[str]) -> Iterator[str]:
    if why := fault(pattern):
        raise ConfigError(f"{setting}: '{pattern:.80}' is not a valid regular expression: {why}")
    return (name for name in names if re.fullmatch(pattern, name))


def _ends_with(name: str) -> str:
    """Return the regular expression of what PEFT matches to a name in a list."""
    return rf"(.*\.)?{re.escape(name)}"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the full names of the linear layers that text passes through, without the output layer.

    GPT-2's Conv1D counts as linear. Layers of a router class that return more than their product do not: an adapter
    could not be added to it.
    """
    head, apart, routers = model.get_output_embeddings(), parts_without_text(model), _routers(model)
    return [
        name
        for name, module in model.named_modules()
        if module is not head
        and name not in routers
        and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and not is_within(name, apart)
    ]


def bypassed_layers(model: torch.nn.Module) -> list[str]:
    """Return the full names of the linear layers whose weights a state-space block reads without calling the layer.

    An adapter on them is bypassed, always (Mamba's `dt_proj`) or where fused kernels compute the block (`out_proj` of
    Mamba 2). The source of the block's class says which they are; in other blocks such lines are for rare settings.
    """
    blocks = [(name, module) for name, module in model.named_modules() if hasattr(module, "A_log")]
    read = {kind: sorted({*_READ.findall(_source(kind))}) for kind in {type(block) for _, block in blocks}}
    return [
        f"{name}.{layer}"
        for name, block in blocks
        for layer in read[type(block)]
        if isinstance(getattr(block, layer, None), torch.nn.Linear)
    ]


def unquantizable_layers(model: torch.nn.Module) -> list[str]:
    """Return the full names of the layers of `bypassed_layers` in blocks that do not expect packed weights."""
    kinds = {name: type(module) for name, module in model.named_modules() if hasattr(module, "A_log")}
    return [name for name in bypassed_layers(model) if "_is_quantized" not in _source(kinds[name.rpartition(".")[0]])]


def _routers(model: torch.nn.Module) -> set[str]:
    """Return the names of the linear layers that choose experts (PhiMoE's), which return more than their product."""
    linear = ((name, type(module)) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return {name for name, kind in linear if "router" in kind.__name__.lower()}


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # a class without a file
        return ""


def linear_targets(wanted: str | list[str], model: Any) -> list[str]:
    """Return the full names of the linear layers that an optimizer's `optim_target_modules` names.

    Args:
        wanted: a preset, a regular expression of whole names, or a list of (ends of) names.
        model: the model.

    Raises:
        ConfigError: one of them matches no linear layer but the output layer.
    """
    linear, key = linear_layers(model), "optimizer.optim_target_modules"
    chosen: set[str] = set()
    for target in [wanted] if isinstance(wanted, str) else wanted:
        if target == wanted and wanted in PRESETS:
            matching = {*linear} if wanted == "all-linear" else _preset(wanted, model, linear)
        else:
            matching = {*_matching(key, target if target == wanted else _ends_with(target), linear)}
        if not matching:
            kinds = ", ".join(count_kinds(linear))
            raise ConfigError(f"{key}: '{target}' matches no linear layer of this model; it has {kinds}")
        chosen |= matching
    return [name for name in linear if name in chosen]


def roles(model: PreTrainedModel) -> dict[str, str]:
    """Return what the linear layers inside the blocks are: query, key, value, output (of attention) or mlp.

    Layers that are several of these at once (fused queries, keys and values) or none of them are left out.
    """
    linear = linear_layers(model)
    known = {"query": _QUERY, "key": _KEY, "value": _VALUE, "output": _OUTPUT}
    leaves = {name: name.rpartition(".")[2] for name in _preset("attention", model, linear)}
    found = {name: role for name, leaf in leaves.items() for role, kind in known.items() if kind.fullmatch(leaf)}
    return dict.fromkeys(_preset("mlp", model, linear), "mlp") | found


def fused_experts(model: torch.nn.Module) -> list[str]:
    """Return the full names of the parameters that hold the weights of all experts of a layer in one tensor."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() or name.endswith("experts")
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim == 3
    ]


def shortest_names(chosen: Collection[str], model: torch.nn.Module) -> list[str]:
    """Return the shortest ends of names that the chosen modules have, and no others."""
    others = {end for name in {name for name, _ in model.named_modules()} - {*chosen} for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in chosen})


def parts_without_text(model: PreTrainedModel) -> list[str]:
    """Return the names of the parts that text does not pass through, such as the vision tower of a multimodal model."""
    if model.config.get_text_config() is model.config:
        return []
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    parents = {".".join(path.split(".")[:depth]) for depth in range(path.count(".") + 1)} if path else set()
    return [
        name
        for name, module in model.named_modules()
        if name and name.rpartition(".")[0] in parents and name not in {*parents, path} and module is not head
    ]


def count_kinds(names: Iterable[str]) -> dict[str, int]:
    """Count modules by name, with `*` for the number of the layer: {"model.layers.*.self_attn.q_proj": 24}."""
    counts: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"\.\d+(?=\.)", ".*", name)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def summary(adapted: Any, model: PreTrainedModel, wanted: str | list[str] | None) -> dict[str, str]:
    """Describe which layers an adapter changes, and which it leaves out although a user may expect otherwise.

    Args:
        adapted: the model with the adapter.
        model: the base model without one; its weights are not used.
        wanted: `target_modules` of the run's config.

    Returns:
        Names of layers with their counts, under `adapted`, `left_out`, `bypassed` and `without_text`, where there are
        any.
    """
    names = adapted_names(adapted)
    groups = {"adapted": names, "without_text": parts_without_text(model)}
    if wanted == "all-linear":
        groups["bypassed"] = bypassed_layers(model)
        others = (*linear_layers(model), *fused_experts(model))
        groups["left_out"] = [name for name in others if name not in {*names, *groups["bypassed"]}]
    return {
        group: ", ".join(f"{kind} ({count})" for kind, count in count_kinds(members).items())
        for group, members in groups.items()
        if members
    }


def adapted_names(adapted: Any) -> list[str]:
    """Return the full names of the modules and parameters that an adapter changes; none for prompts and prefixes."""
    tuner = adapted.base_model
    return [*getattr(tuner, "targeted_module_names", []), *getattr(tuner, "targeted_parameter_names", [])]


def misunderstood(settings: PeftConfig, modules: Collection[str], adapted: Collection[str]) -> Iterator[str]:
    """Yield a message for each entry that names modules and that PEFT would ignore, or match to other modules too.

    Args:
        settings: PEFT's config.
        modules: the names of the base model's modules.
        adapted: the names of those that are adapted, and of adapted parameters.
    """
    kinds = ", ".join(count_kinds(adapted))
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, setting, None) or {}:
            if not [*_matching(f"method.{setting}", rf"(.*\.)?({key})", adapted)]:
                yield f"method.{setting}: '{key}' matches no adapted layer; adapted: {kinds}"
    for key in getattr(settings, "target_parameters", None) or []:
        if not [*_matching("method.target_parameters", _ends_with(key), adapted)]:
            yield f"method.target_parameters: '{key}' matches no parameter of this model; adapted: {kinds}"
    numbers = {int(part) for name in adapted for part in name.split(".") if part.isdigit()}
    chosen = getattr(settings, "layers_to_transform", None)
    for number in [chosen] if isinstance(chosen, int) else chosen or []:
        if number not in numbers:
            yield f"method.layers_to_transform: no adapted layer has the number {number}; adapted: {kinds}"
    named = getattr(settings, "target_modules", None) not in (None, "all-linear")
    missing = [name for name in modules if named and check_target_module_exists(settings, name) and name not in adapted]
    if missing:
        yield (
            f"method.target_modules: PEFT does not adapt {', '.join(count_kinds(missing))}: in a mixture of experts it "
            "takes these names for those of the fused experts; name other layers"
        )
    for setting in ("modules_to_save", "exclude_modules"):
        wanted = getattr(settings, setting, None) or []
        for key in [wanted] if isinstance(wanted, str) else sorted(wanted):
            pattern = key if isinstance(wanted, str) else _ends_with(key)
            if not (matching := {*_matching(f"method.{setting}", pattern, modules)}):
                leaves = {name.rpartition(".")[2] for name in modules} - {""}
                yield f"method.{setting}: '{key}' matches no module of this model{did_you_mean(key, sorted(leaves))}"
            more = sorted({name for name in modules if name.endswith(key)} - matching)
            if setting == "modules_to_save" and matching and more:
                yield (
                    f"method.modules_to_save: PEFT would also train {', '.join(count_kinds(more))}, whose names end "
                    f"like '{key}'; write {', '.join(sorted(matching))}"
                )


def _preset(preset: str, model: PreTrainedModel, linear: list[str]) -> set[str]:
    attention = {name for name in linear if _is_inside(name, model, _ATTENTION)}
    mixers = [name for name, module in model.named_modules() if hasattr(module, "A_log")]
    others = [name for name in linear if name not in attention and not is_within(name, mixers)]
    mlp = {name for name in others if _is_inside(name, model, _MLP)}
    match preset:
        case "attention":
            return attention
        case "mlp":
            return {name for name in mlp if not _ROUTER.fullmatch(name.rpartition(".")[2])}
        case "outputs":
            return {name for name in attention | mlp if _OUTPUT.fullmatch(name.rpartition(".")[2])}
    queries, values = (
        {name for name in attention if kind.fullmatch(name.rpartition(".")[2])} for kind in (_QUERY, _VALUE)
    )
    return queries | values if queries and values else set()


def _is_inside(name: str, model: PreTrainedModel, kind: re.Pattern[str]) -> bool:
    """Return whether a linear layer belongs to a block of this kind, by the names and classes of what it is inside of.

    Only what is inside one of the numbered layers counts, not the model as a whole.
    """
    parts = name.split(".")
    first = next((place + 1 for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return any(
        kind.search(parts[place])
        or (place < len(parts) - 1 and kind.search(type(model.get_submodule(".".join(parts[: place + 1]))).__name__))
        for place in range(first, len(parts))
    )


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def is_named(name: str, names: str | Iterable[str]) -> bool:
    """Return whether a module is one of those that PEFT finds by these ends of names."""
    return any(f".{name}".endswith(f".{end}") for end in ([names] if isinstance(names, str) else names))


def is_within(name: str, parts: Iterable[str]) -> bool:
    """Return whether a module or parameter is one of these parts of a model, or inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _no_match(target: str, model: PreTrainedModel, linear: Iterable[str], is_item: bool = False) -> str:
    experts = ", ".join(count_kinds(fused_experts(model)))
    start = NO_MODULE.format(target)
    if target in PRESETS and is_item:
        start = f"method.target_modules: '{target}' is a preset, not the name of a module: write it without a list"
    elif target not in PRESETS:
        start += did_you_mean(target, [*sorted({name.rpartition(".")[2] for name in linear}), *PRESETS])
        if not is_item and any(re.search(target, name) for name in linear):
            start += f" A regular expression must match whole names: '.*({target})'"
    end = f"; its experts are fused parameters ({experts}): name them in method.target_parameters" if experts else ""
    return no_module(start, count_kinds(linear), end)
