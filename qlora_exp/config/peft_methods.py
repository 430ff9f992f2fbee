"""PEFT's methods and their settings, read from the installed PEFT's source (and `bottleneck`) without importing it.

Importing PEFT takes seconds (it imports torch); a wrong config must fail in one. So the config
dataclasses are parsed, never executed: names, types and defaults of the fields are PEFT's own, and
a method that a newer PEFT adds is known here by its name with no new code.

This module knows nothing of our config beyond "a PEFT type and its settings".
"""

import ast
import importlib.util
import re
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qlora_exp.utils.errors import ConfigError, did_you_mean

# Set by PEFT, by the run or by the model, so not settings of an experiment.
_NOT_SETTINGS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "loftq_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
        "total_step",
    }
)
_READS_FILES = ("cache_file", "covariance_file")
_MOVES_BASE = r"pissa(_niter_\d+)?|olora|corda|lora_ga"
_ON_PLAIN_BASE = rf"{_MOVES_BASE}|mica|orthogonal"
_PLAIN_BASE_ONLY = ("kasa_config", "monteclora_config", "velora_config")
_STARTS = rf"{_ON_PLAIN_BASE}|gaussian|eva|loftq"
# What PEFT's own annotation of a field leaves out or spells as prose.
_CORRECTED = {"init_lora_weights": bool | Annotated[str, Field(pattern=rf"^({_STARTS})$")]}
_POSITIVE = frozenset({"bottleneck_size", "r", "lora_alpha", "init_r", "target_r", "num_virtual_tokens"})


_NEEDS_MORE = {
    "CPT": "needs the token types of an example in context, which rows here do not have",
    "MULTITASK_PROMPT_TUNING": "needs the task of each row, and rows here are of one task",
    "POLY": "needs the task of each row, and rows here are of one task",
    "XLORA": "mixes LoRA adapters that are trained already, and a run here trains one",
}
"""Methods that a supervised fine-tune of one model on one task cannot use, and why."""


class _Names(dict[str, Any]):
    """Names an annotation may use; one that is unknown here (a nested config) is a mapping."""

    def __missing__(self, name: str) -> Any:
        return dict


_ANNOTATION_NAMES = _Names(
    {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Sequence", "Union")}
    | {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
    | {"Dict": dict, "List": list, "Tuple": tuple, "None": None}
)


@cache
def _sources() -> dict[Path, str]:
    spec = importlib.util.find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("peft is not installed: pip install peft")
    root = Path(spec.submodule_search_locations[0])
    files = [file for file in sorted((root / "tuners").rglob("*.py")) if "config" in file.name]
    files += [
        root / "config.py",
        root / "tuners" / "lycoris_utils.py",
        Path(__file__).parents[1] / "models" / "bottleneck.py",
    ]
    return {file: text for file in files if "class" in (text := file.read_text("utf-8"))}


@cache
def _class(name: str) -> ast.ClassDef | None:
    for text in _sources().values():
        if re.search(rf"^class {name}\b", text, re.MULTILINE):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node
    return None


@cache
def methods() -> dict[str, str]:
    """Each PEFT type (`"LORA"`, `"IA3"`, ...) with the name of its config class."""
    found = {}
    for text in _sources().values():
        class_name = ""
        for line in text.splitlines():
            if match := re.match(r"class (\w+)", line):
                class_name = match[1]
            elif match := re.search(r"self\.peft_type\s*=\s*PeftType\.(\w+)", line):
                found[match[1]] = class_name
    return found


def _annotation(node: ast.expr) -> Any:
    try:
        return eval(ast.unparse(node), {"__builtins__": {}}, _ANNOTATION_NAMES)
    except (TypeError, AttributeError):  # an annotation of other names, e.g. torch.dtype
        return Any


@cache
def settings(peft_type: str) -> dict[str, Any]:
    """The fields that a config may set for `peft_type`, each with its type, as PEFT declares them.

    Raises:
        ConfigError: the installed PEFT has no such type.
    """
    if peft_type not in methods():
        raise ConfigError(
            f"method.peft_type: PEFT has no '{peft_type}'{did_you_mean(peft_type, methods())} "
            f"Known: {', '.join(sorted(methods()))}"
        )
    fields: dict[str, Any] = {}
    queue = [methods()[peft_type]]
    while queue:
        node = _class(queue.pop(0))
        if node is None:
            continue
        queue += [base.id for base in node.bases if isinstance(base, ast.Name)]
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                fields.setdefault(item.target.id, _annotation(item.annotation))
    return {name: _CORRECTED.get(name, kind) for name, kind in fields.items() if name not in _NOT_SETTINGS}


def moves_base(start: str | None) -> bool:
    """Whether LoRA starting so (`init_lora_weights`) takes a part of the base's weights into the adapter."""
    return start is not None and re.fullmatch(_MOVES_BASE, start) is not None


def needs_plain_base(settings: dict[str, Any]) -> str | None:
    """Which of LoRA's settings PEFT cannot follow on a quantized base; None if it can follow all.

    Starts that factor weights fail there, VeLoRA too; MonteCLoRA would silently be plain LoRA.
    """
    if re.fullmatch(_ON_PLAIN_BASE, str(settings.get("init_lora_weights"))):
        return "init_lora_weights"
    return next((name for name in _PLAIN_BASE_ONLY if settings.get(name) is not None), None)


@cache
def _validator(peft_type: str, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(settings(peft_type)[name], config=ConfigDict(strict=True))


def check(section: str, peft_type: str, given: dict[str, Any]) -> list[str]:
    """What is wrong with `given` as settings of `peft_type`: one message for each, empty if nothing."""
    known = settings(peft_type)
    problems = [f"{section}.peft_type: {peft_type} {_NEEDS_MORE[peft_type]}"] if peft_type in _NEEDS_MORE else []
    for name, value in given.items():
        if name not in known:
            problems.append(
                f"{section}.{name}: PEFT's {methods()[peft_type]} has no such setting{did_you_mean(name, known)}"
            )
            continue
        try:
            _validator(peft_type, name).validate_python(value)
        except ValidationError as error:
            reasons = dict.fromkeys(found["msg"] for found in error.errors()[:3])
            problems.append(f"{section}.{name}: {'; or '.join(reasons)}; got {value!r}")
            continue
        if isinstance(value, dict) and (files := sorted(value.keys() & set(_READS_FILES))):
            problems.append(f"{section}.{name}.{files[0]}: a run starts from its own rows, not from files")
        # Ranges that PEFT checks late (after the model is loaded), or not at all.
        if name in _POSITIVE and value <= 0:
            problems.append(f"{section}.{name}: must be positive, got {value}")
        if name.endswith("dropout") and not 0 <= value < 1:
            problems.append(f"{section}.{name}: must be at least 0 and below 1, got {value}")
    return problems
