"""Check the settings of PEFT methods against `peft_methods.json`, without importing PEFT.

Importing PEFT takes seconds because it imports torch; a wrong config must be rejected within one second. So a file
lists the names and types of the fields of PEFT's config dataclasses (and of the method in `models/bottleneck`).
`nox -s library-settings` writes it from the installed PEFT. A setting that is not in the file is rejected; the message
says so if the installed PEFT is another version than the one that the file was made from.

Of the config this module needs only a PEFT type and its settings.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from qlora_exp.config.tables import declared_types
from qlora_exp.utils.errors import ConfigError, did_you_mean

FILE = Path(__file__).with_suffix(".json")

# PEFT, the run or the model sets these, so they are not settings of an experiment.
_NOT_SETTINGS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "loftq_config",
        "megatron_config",
        "megatron_core",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
        "token_dim",
        "total_step",
    }
)
PRESETS = ("all-linear", "attention", "mlp", "q_v", "outputs")
"""Values of `target_modules` for which a run finds the modules; it lists the names of all but the first for PEFT."""
FROM_ROWS = ("corda", "eva", "lora_ga")
"""Initializations of LoRA (`init_lora_weights`) that use training rows."""
_READS_FILES = ("cache_file", "covariance_file")
_MOVES_BASE = r"pissa(_niter_\d+)?|olora|corda|lora_ga"
_ON_PLAIN_BASE = rf"{_MOVES_BASE}|mica|orthogonal"
_PLAIN_BASE_ONLY = ("kasa_config", "monteclora_config", "velora_config")
_STARTS = rf"{_ON_PLAIN_BASE}|gaussian|eva|loftq"
# Types of fields whose annotation in PEFT is incomplete.
_CORRECTED = {"lora_alpha": int | float, "init_lora_weights": bool | Annotated[str, Field(pattern=rf"^({_STARTS})$")]}
_POSITIVE = frozenset({"bottleneck_size", "r", "lora_alpha", "init_r", "target_r", "num_virtual_tokens"})

_OF_LORA_ONLY = ("r", "alpha_pattern", "lora_bias", "qalora_group_size", "use_bdlora", "use_qalora", "use_rslora")
_UNUSED = {
    "ADALORA": (*_OF_LORA_ONLY, *(f"{name}_config" for name in ("arrow", "corda", "eva", "kasa", "lora_ga", "velora"))),
    "LOHA": ("use_effective_conv2d",),
    "LOKR": ("use_effective_conv2d",),
}
"""Settings that PEFT accepts and never uses for a language model with this method."""
_SWITCHED: dict[str, list[tuple[str, Any, tuple[str, ...]]]] = {
    "ADAMSS": [
        ("use_asa", True, ("init_warmup", "final_warmup", "mask_interval", "asa_target_subspaces")),
        ("use_asa", True, ("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent")),
        ("use_dynamic_rank", True, ("svd_threshold",)),
    ],
    "LOKR": [("rank_dropout", ..., ("rank_dropout_scale",))],
    "LORA": [
        ("use_qalora", True, ("qalora_group_size",)),
        ("init_lora_weights", "eva", ("eva_config",)),
        ("init_lora_weights", "corda", ("corda_config",)),
        ("init_lora_weights", "lora_ga", ("lora_ga_config",)),
        ("modules_to_save", ..., ("ensure_weight_tying",)),
    ],
    "MISS": [("init_weights", "mini", ("mini_r",))],
    "OFT": [("coft", True, ("eps",))],
    "PREFIX_TUNING": [("prefix_projection", True, ("encoder_hidden_size",))],
    "PROMPT_TUNING": [
        ("prompt_tuning_init", "TEXT", ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"))
    ],
    "PSOFT": [
        ("use_cayley_neumann", True, ("num_cayley_neumann_terms", "cayley_neumann_eps")),
        ("psoft_svd", "lowrank", ("psoft_svd_lowrank_niter", "random_seed")),
    ],
    "P_TUNING": [("encoder_reparameterization_type", "LSTM", ("encoder_dropout", "encoder_num_layers"))],
}
"""By method: a setting, the value that it must have (`...`: any but zero and null), and the settings that need it."""


_NEEDS_MORE = {
    "CPT": "needs the token types of an in-context example, which the rows do not have",
    "MULTITASK_PROMPT_TUNING": "needs several tasks, and the rows here belong to one task",
    "POLY": "needs several tasks, and the rows here belong to one task",
    "XLORA": "mixes LoRA adapters that are already trained, and a run here trains a new one",
}
"""Methods that supervised fine-tuning of one model on one task cannot use, and why."""


@cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


@cache
def methods() -> dict[str, str]:
    """Return the name of the config class of each PEFT type (`"LORA"`, `"IA3"`, ...)."""
    return {peft_type: method["config"] for peft_type, method in _table()["methods"].items()}


@cache
def settings(peft_type: str) -> dict[str, Any]:
    """Return the fields that a config may set for `peft_type`, with their types as PEFT declares them.

    Raises:
        ConfigError: PEFT has no such type.
    """
    if peft_type not in methods():
        raise ConfigError(
            f"method.peft_type: PEFT has no '{peft_type}'{did_you_mean(peft_type, methods())} "
            f"PEFT types: {', '.join(sorted(methods()))}{_other_version()}"
        )
    fields = _table()["methods"][peft_type]["settings"].items()
    return {
        name: _CORRECTED.get(name) or declared_types.python_type(kind)
        for name, kind in fields
        if name not in _NOT_SETTINGS
    }


def of_options(peft_type: str) -> list[str]:
    """List the settings of a method that can change something: without those that PEFT ignores with it.

    Raises:
        ConfigError: PEFT has no such type.
    """
    return [name for name in settings(peft_type) if name not in ("fan_in_fan_out", *_UNUSED.get(peft_type, ()))]


def trainable() -> list[str]:
    """List the PEFT types that supervised fine-tuning of one model can use."""
    return sorted(methods().keys() - _NEEDS_MORE.keys())


def allowed_range(name: str) -> str:
    """Return the range of a setting that is checked before a run, in words; empty if only its type is."""
    return "above 0" if name in _POSITIVE else "at least 0 and below 1" if name.endswith("dropout") else ""


def _other_version() -> str:
    return declared_types.other_version({"peft": _table()["peft"]})


def moves_base_weights(start: str | None) -> bool:
    """Return whether this initialization (`init_lora_weights`) moves a part of the base weights into the adapter."""
    return start is not None and re.fullmatch(_MOVES_BASE, start) is not None


def cannot_train_on(peft_type: str, settings: dict[str, Any]) -> str | None:
    """Return why an adapter of this kind cannot be trained on from what is saved of it; None if it can."""
    if peft_type == "ADALORA":
        return "it ends with ranks that its schedule has cut, which cannot be scheduled again"
    if peft_type == "P_TUNING" or (peft_type == "PREFIX_TUNING" and settings.get("prefix_projection")):
        return "of its prompt the values are saved, but not the network that makes them"
    return None


def needs_unquantized_base(settings: dict[str, Any]) -> str | None:
    """Return the name of a LoRA setting that does not work on a quantized base; None if all work.

    Initializations that factor weights fail there, and so does VeLoRA. MonteCLoRA would silently be plain LoRA.
    """
    if re.fullmatch(_ON_PLAIN_BASE, str(settings.get("init_lora_weights"))):
        return "init_lora_weights"
    return next((name for name in _PLAIN_BASE_ONLY if settings.get(name) is not None), None)


def idle(peft_type: str, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each setting that changes nothing with this method and its other settings, with the reason."""
    yield "fan_in_fan_out", "PEFT sets it by the type of each layer"
    for name in _UNUSED.get(peft_type, ()):
        yield name, f"PEFT's {methods()[peft_type]} does not use it"
    for switch, value, names in _SWITCHED.get(peft_type, ()):
        if given.get(switch) != value if value is not ... else not given.get(switch):
            yield from ((name, f"it needs {switch}" + (f"={value}" if value is not ... else "")) for name in names)
    targets = given.get("target_modules")
    if isinstance(targets, str) and targets not in PRESETS[1:]:
        yield "layers_to_transform", f"PEFT ignores it with target_modules={targets}: list the names of modules"


@cache
def _validator(peft_type: str, name: str) -> TypeAdapter[Any]:
    return declared_types.validator(settings(peft_type)[name])


def check(section: str, peft_type: str, given: dict[str, Any]) -> list[str]:
    """Check settings of a PEFT method.

    Args:
        section: `method` or `lora_variant`, for messages.
        peft_type: type of the method in PEFT.
        given: settings and their values.

    Returns:
        A message for each problem; empty if there is none.
    """
    allowed = settings(peft_type)
    problems = [f"{section}.peft_type: {peft_type} {_NEEDS_MORE[peft_type]}"] if peft_type in _NEEDS_MORE else []
    for name, value in given.items():
        if name not in allowed:
            problems.append(
                f"{section}.{name}: PEFT's {methods()[peft_type]} has no such setting"
                f"{did_you_mean(name, allowed)}{_other_version()}"
            )
            continue
        if why := declared_types.misfit(_validator(peft_type, name), value):
            problems.append(f"{section}.{name}: {why}")
            continue
        if isinstance(value, dict) and (files := sorted(value.keys() & set(_READS_FILES))):
            problems.append(f"{section}.{name}.{files[0]}: a run initializes from its training rows, not from files")
        # Ranges that PEFT checks only after the model is loaded, or not at all.
        if name in _POSITIVE and value <= 0:
            problems.append(f"{section}.{name}: must be positive, got {value}")
        if name.endswith("dropout") and not 0 <= value < 1:
            problems.append(f"{section}.{name}: must be {allowed_range(name)}, got {value}")
    return problems
