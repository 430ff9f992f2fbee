"""Attach the adapter of a method and variant to the base model, through PEFT's own registry.

Does not depend on training. `keep_dtypes` is here because the trainer would change dtypes that this module sets.
"""

import copy
import json
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from transformers import PreTrainedModel

import qlora_exp.models.bottleneck  # noqa: F401 - registers its method with PEFT
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import compatibility
from qlora_exp.libraries.peft import complete_heads, follow_forward_of_base, loss_of_adapter
from qlora_exp.models.base import named, new_tokens
from qlora_exp.models.new_tokens import rows_to_train
from qlora_exp.models.targets import (
    count_kinds,
    fused_experts,
    is_named,
    linear_layers,
    parts_without_text,
    resolve_targets,
    shortest_names,
)
from qlora_exp.models.untrusted import explained
from qlora_exp.utils.errors import ConfigError, ModelError, first_line, is_out_of_memory

_UNKNOWN_STEPS = 10**9
"""Placeholder: AdaLoRA needs the number of steps before it is determined. `fit_schedule` sets the real one later."""
_NOT_ON_EXPERTS = ("use_dora", "lora_bias", "kasa_config", "monteclora_config", "velora_config")
_NO_START_ON_EXPERTS = ("pissa", "olora", "orthogonal", "eva", "mica")
_OF_SMALLEST_SIDE = ("pissa", "olora", "corda", "lora_ga", "mica")
"""Ways to initialize LoRA from as many singular vectors of a layer as its rank."""
_DOT = re.compile(r"\.")
_FROM_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""Methods that put learned keys and values into the attention's cache."""
LEAVES_UNUSED = ("SHADOW",)
"""Methods with trainable parameters that the loss does not depend on: ShadowPEFT's state after the last block."""


def peft_config(config: Config, skeleton: PreTrainedModel, new: Collection[int] | None = None) -> PeftConfig | None:
    """Return PEFT's config of the method, with target modules that exist in the model.

    Text does not pass through all parts of a multimodal model; the others are never adapted.

    Args:
        config: the run's config.
        skeleton: the base model; its weights are not used.
        new: numbers of `model.new_tokens`; None: those that the model's tokenizer gives them.

    Returns:
        None for a full fine-tune, which trains all parameters.

    Raises:
        ConfigError: PEFT refuses a setting, target modules match no module, or the method cannot train this model.
    """
    method = config.method
    if method.peft_type is None:
        return None
    settings = copy.deepcopy(config.peft_settings)  # PEFT adds names to lists of its config, such as modules_to_save
    if method.peft_type == "ADALORA":
        settings["total_step"] = _UNKNOWN_STEPS
    if config.lora_start == "loftq":
        settings["init_lora_weights"] = True  # PEFT's own LoftQ would quantize the base itself
    if settings.get("target_modules") is not None:
        settings["target_modules"] = resolve_targets(settings["target_modules"], skeleton)
    if config.model.new_tokens and method.peft_type == "LORA":
        rows = rows_to_train(skeleton, new_tokens(config.model) if new is None else new)
        whole = settings.get("modules_to_save") or []
        if rows := {name: numbers for name, numbers in rows.items() if not is_named(name, whole)}:
            settings["trainable_token_indices"] = rows
    needs_names = config.lora_start in ("corda", "lora_ga") or config.quantization.quant_method in ("gptq", "awq")
    if settings.get("target_modules") == "all-linear" and needs_names:
        # For these starts PEFT looks for the layers before it expands "all-linear". Layers of these quantizers are not
        # linear layers to PEFT.
        settings["target_modules"] = shortest_names(linear_layers(skeleton), skeleton)
    try:
        checked = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)](task_type=TaskType.CAUSAL_LM, **settings)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"method={method.name}: PEFT refuses its settings: {error}") from error
    if not compatibility.is_ignored() and (why := next(_unfit(config, checked, skeleton), None)):
        raise ConfigError(f"{config.cannot_train}: {why}")
    return checked


def _unfit(config: Config, settings: Any, skeleton: PreTrainedModel) -> Iterator[str]:
    """Yield what is known to fail, with a remedy, that PEFT itself does not refuse, or not in clear words."""
    method, experts = config.method, fused_experts(skeleton)
    if method.peft_type in _FROM_CACHE and experts:
        yield "in a mixture of experts, the router's loss counts the positions that this method adds; use method=lora"
    kind = compatibility.kind_of(method.kind, config.lora_variant.name)
    family = skeleton.config.get_text_config().model_type
    kinds = getattr(skeleton.config.get_text_config(), "layer_types", None)
    packed = experts if config.quantization.packs_experts else []
    whole = getattr(settings, "modules_to_save", None) or []
    if trained := [name for name in packed if any(is_named(name[: dot.start()], whole) for dot in _DOT.finditer(name))]:
        yield (
            f"method.modules_to_save={list(whole)} trains fused experts as a whole ({trained[0]}, ...), which 4 bits "
            "cannot be: adapt them (method.target_modules=all-linear), or set quantization.bnb_4bit_experts=false"
        )
    if getattr(settings, "layer_replication", None) and kinds:
        yield (
            f"PEFT repeats layers, but not their kinds, which the config of a {family} model lists (layer_types): "
            "leave method.layer_replication out, or use a model of another family, such as Llama"
        )
    if method.peft_type == "LORA":
        start = config.lora_start or ""
        if start == "olora" and any(type(layer).__name__ == "Conv1D" for layer in skeleton.modules()):
            yield "PEFT's OLoRA does not work on Conv1D layers, which this model has; use lora_variant=pissa or lora"
        if experts and _adapts_experts(settings, skeleton):
            adapted = f"adapted are also the experts of this model, which are fused parameters ({experts[0]}, ...)"
            remedy = "adapt the attention only: method.target_modules=attention"
            if settings.lora_dropout:
                yield f"{adapted}; LoRA on them has no dropout: set method.lora_dropout=0, or {remedy}"
            names = [name for name in _NOT_ON_EXPERTS if getattr(settings, name, None)]
            if packed and start == "loftq":
                yield f"{adapted}; LoftQ does not make up for what 4 bits lose of them: {remedy}, or use another start"
            if start.startswith(_NO_START_ON_EXPERTS):
                names.append(f"init_lora_weights={start}")
            if names:
                yield f"{adapted}; {', '.join(names)} does not work on them: use lora_variant=lora, or {remedy}"
        decomposes = start.startswith(_OF_SMALLEST_SIDE) or getattr(settings, "kasa_config", None)
        if decomposes and (thin := _thinner_than_rank(settings, skeleton)):
            yield (
                f"lora_variant={config.lora_variant.name} needs layers with no side below method.r={settings.r}, which "
                f"{', '.join(count_kinds(thin))} have: leave these out (method.exclude_modules=["
                f"{','.join(shortest_names(thin, skeleton))}]), or use lora_variant=lora"
            )
    if why := compatibility.family_refusal(kind, family):
        yield why


def _thinner_than_rank(settings: Any, skeleton: PreTrainedModel) -> list[str]:
    """Return the linear layers to adapt that have fewer inputs or outputs than LoRA's rank."""
    chosen = copy.copy(settings)
    if chosen.target_modules == "all-linear":
        chosen.target_modules = ".*"
    adapted = {name: skeleton.get_parameter(f"{name}.weight") for name in linear_layers(skeleton)}
    return [
        name
        for name, weight in adapted.items()
        if min(weight.shape) < settings.r and check_target_module_exists(chosen, name)
    ]


def _adapts_experts(settings: PeftConfig, skeleton: PreTrainedModel) -> bool:
    """Return whether PEFT adapts fused experts: it does so for all-linear, and for the names of transformers 4."""
    converted: Any = copy.deepcopy(settings)
    try:
        convert_peft_config_for_transformers(converted, skeleton, None)
    except ValueError as error:
        raise ConfigError(f"method.target_modules: {first_line(error)}") from error
    names = tuple(f".{name}" for name in converted.target_parameters or ())
    return any(f".{parameter}".endswith(names) for parameter in fused_experts(skeleton))


def scalings(model: Any) -> list[float]:
    """Return LoRA's distinct factors of what layers add, in order: alpha / r, or with rsLoRA alpha / sqrt(r)."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return sorted({float(factor) for layer in layers for factor in layer.scaling.values()})


def attach(
    model: PreTrainedModel, settings: PeftConfig | None, adapter_dtype: str | None
) -> PreTrainedModel | PeftModel:
    """Return the model with trainable parameters: an adapter's, or all of the model's own.

    Args:
        model: the base model.
        settings: PEFT's config; None for a full fine-tune.
        adapter_dtype: dtype of the adapter's parameters; None: float32.

    Raises:
        ConfigError: PEFT cannot adapt this model with this method.
    """
    if settings is None:
        for name in parts_without_text(model):  # they would have no gradients, but would count as trained
            model.get_submodule(name).requires_grad_(False)
        return model.train()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 says so of its own entries for fused experts, which it does use; `checks` checks the user's.
            warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
            adapted = get_peft_model(model, settings)
    except (ValueError, TypeError, ImportError, AttributeError, LookupError, AssertionError, RuntimeError) as error:
        if is_out_of_memory(error) or lacks_values(error):
            raise
        if "specify `target_modules`" in str(error):
            raise ConfigError(
                f"PEFT has no default layers of {settings.peft_type} for a {model.config.model_type} model: name some "
                "in method.target_modules (for IA3, those of the MLP in method.feedforward_modules too)"
            ) from error
        reason = re.sub(r"(Target module \w+)\(.*\) is", r"\1 is", str(error), flags=re.DOTALL)  # it prints the module
        raise ConfigError(f"PEFT cannot adapt this model with {settings.peft_type}: {reason}") from error
    complete_heads(adapted)
    if settings.peft_type == PeftType.ADAPTION_PROMPT:
        follow_forward_of_base(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, adapter_dtype or "float32"))
    return adapted


def lacks_values(error: BaseException) -> bool:
    """Return whether code failed because it reads values, which a model on the meta device does not have."""
    return re.search(r"(?<![a-z])meta(?![a-z])", str(error), re.IGNORECASE) is not None  # register_meta too


def trainable_set(model: torch.nn.Module) -> set[str]:
    """Return the names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_parameters(model: Any) -> set[str]:
    """Return the names of the parameters that a saved model has: those of the adapter if there is one, else all."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if not isinstance(model, PeftModel):
        return names
    prefix = getattr(model.base_model, "prefix", None)  # trained prompts have none
    return trainable_set(model) | {name for name in names if prefix and prefix in name}


def missing_tensors(model: Any, folder: Path, adapter: str = "default") -> list[str]:
    """Return the names of the tensors of a model, or of its adapter, that the files in a folder lack.

    PEFT and the trainer load what there is, and leave random or untrained values in the place of what is missing.
    """
    if isinstance(model, PeftModel):
        needed = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    else:
        needed = model.state_dict()
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {*tensors.keys()}
    tied = {needed[name].data_ptr() for name in stored & needed.keys()}
    return sorted(name for name, tensor in needed.items() if name not in stored and tensor.data_ptr() not in tied)


@contextmanager
def fit_explained(base: Any, folder: Path) -> Iterator[None]:
    """Explain inside why PEFT cannot load the adapter in `folder` into the model `base`, as a `ModelError`."""
    with explained(f"{folder}: the adapter"):
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            first = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
            raise ModelError(f"{folder}: does not fit {base.config.name_or_path}: {first:.300}") from error


def check_complete(model: Any, folder: Path, name: str = "default") -> None:
    """Check that the adapter's file has all tensors that its config describes.

    Raises:
        ModelError: some are missing.
    """
    if missing := missing_tensors(model, folder, name):
        raise ModelError(
            f"{folder}: the adapter's file lacks {len(missing)} tensors that its config describes: "
            f"{named(missing)}; copy the whole adapter again"
        )


def save_trained_only(model: Any) -> None:
    """Let the next `save_pretrained` of an adapter save what it trains; do nothing for other models.

    PEFT would add whole embeddings if the model has another vocabulary than the files that its adapter's config names.
    It writes the name again when it saves.
    """
    if isinstance(model, PeftModel):
        model.active_peft_config.base_model_name_or_path = None


def load_weights(adapted: Any, folder: Path) -> None:
    """Replace the initial weights of an attached adapter by those of the adapter in `folder`, to train on from them.

    Raises:
        ModelError: the file is damaged, or has other tensors than the attached adapter.
    """
    with fit_explained(adapted, folder):
        result: Any = adapted.load_adapter(str(folder), adapted.active_adapter, is_trainable=True, torch_device="cpu")
    check_complete(adapted, folder, adapted.active_adapter)
    # PEFT puts the values of a prompt into its embedding, and counts them as unexpected.
    if (unused := result.unexpected_keys) and not adapted.active_peft_config.is_prompt_learning:
        raise ModelError(f"{folder}: {len(unused)} tensors have no place in this run's adapter: {named(unused)}")


def set_trainable(model: torch.nn.Module, names: set[str]) -> None:
    """Train these parameters, and no others."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in names):
            parameter.requires_grad_(name in names)


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    """Disable the adapter inside the context: an untrained prefix already changes the base model's output.

    The same parameters are trained after the context as before. PEFT would train all of the adapter, also what LoRA-FA
    has frozen.
    """
    trained = trainable_set(model)
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            yield
    finally:
        set_trainable(model, trained)


def penalty(model: Any) -> torch.Tensor | float:
    """Return the term that KaSA and MonteCLoRA add to the loss in training; 0 for other methods."""
    if not isinstance(model, PeftModel) or model.active_peft_config.peft_type != PeftType.LORA:
        return 0.0
    return loss_of_adapter(model.base_model)


def allocates(model: Any) -> bool:
    """Return whether the method moves its rank budget between layers in training (AdaLoRA, AdaMSS).

    PEFT then needs a call of the tuner's `update_and_allocate` after each optimizer step, which TRL does not make.
    """
    return isinstance(model, PeftModel) and hasattr(type(model.base_model), "update_and_allocate")


def fit_schedule(model: Any, steps: int) -> None:
    """Set the number of training steps in AdaLoRA's config; do nothing for other methods.

    Raises:
        ConfigError: there are too few steps for AdaLoRA's schedule.
    """
    settings = model.peft_config[model.active_adapter]
    if settings.peft_type != PeftType.ADALORA:
        return
    if settings.tinit + settings.tfinal >= steps:
        raise ConfigError(
            f"method.tinit={settings.tinit} and method.tfinal={settings.tfinal} steps without a change of ranks "
            f"leave none of {steps} training steps; reduce them, or train longer"
        )
    settings.total_step = steps


@contextmanager
def keep_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """Restore the values and dtypes of trainable parameters after the context.

    TRL 1.16's SFTTrainer rounds the adapters of a quantized base to bfloat16, and only those. A comparison of LoRA with
    QLoRA would then compare precisions too.
    """
    values = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name]


def make_portable(folder: Path, base_model: str) -> None:
    """Remove from a saved model everything that is valid on this machine only.

    Deletes the trainer's pickled arguments and PEFT's template of a model card. Sets the base model's name in the
    adapter's config to the one in the run's config.
    """
    for name in ("training_args.bin", "README.md"):
        (folder / name).unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    if file.is_file():
        values = json.loads(file.read_text("utf-8")) | {"base_model_name_or_path": base_model}
        file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters; each 4-bit weight counts as one, as in PEFT."""
    trainable, total = PeftModel.get_nb_trainable_parameters(model)
    # GPTQModel's layers keep their weights in buffers, which PEFT does not count.
    packed = (layer for layer in model.modules() if hasattr(layer, "qzeros") and hasattr(layer, "in_features"))
    return trainable, total + sum(layer.in_features * layer.out_features for layer in packed)
