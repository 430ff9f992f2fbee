"""Attach the adapter of a method and variant to the base model, through PEFT's own registry.

Does not depend on training. `keep_dtypes` is here because the trainer would change dtypes that this module sets.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

import qlora_exp.models.bottleneck  # noqa: F401 - registers its method with PEFT
from qlora_exp.config.peft_methods import PRESETS
from qlora_exp.config.schema import Config
from qlora_exp.libraries.peft import follow_forward_of_base, loss_of_adapter
from qlora_exp.utils.errors import ConfigError, did_you_mean

_UNKNOWN_STEPS = 10**9
"""Placeholder: AdaLoRA needs the number of steps before it is determined. `fit_schedule` sets the real one later."""
_OUTPUT = re.compile(r"(o|out|c|down)_proj|wo|w2|fc2|fc_out|dense|dense_4h_to_h")
_QUERY_OR_VALUE = re.compile(r"(q|v|query|value|wq|wv)(_proj|_lin)?")


def peft_config(config: Config, skeleton: PreTrainedModel) -> PeftConfig | None:
    """Return PEFT's config of the method, with target modules that exist in the model.

    Args:
        config: the run's config.
        skeleton: the base model; its weights are not used.

    Returns:
        None for a full fine-tune, which trains all parameters.

    Raises:
        ConfigError: PEFT refuses a setting, or target modules match no module.
    """
    method = config.method
    if method.peft_type is None:
        return None
    settings = config.peft_settings
    if method.peft_type == "ADALORA":
        settings["total_step"] = _UNKNOWN_STEPS
    if config.lora_start == "loftq":
        settings["init_lora_weights"] = True  # PEFT's own LoftQ would quantize the base itself
    if settings.get("target_modules") is not None:
        settings["target_modules"] = resolve_targets(settings["target_modules"], skeleton)
    needs_names = config.lora_start in ("corda", "lora_ga") or config.quantization.quant_method in ("gptq", "awq")
    if settings.get("target_modules") == "all-linear" and needs_names:
        # For these starts PEFT looks for the layers before it expands "all-linear". Layers of these quantizers are not
        # linear layers to PEFT.
        settings["target_modules"] = sorted({name.rpartition(".")[2] for name in linear_layers(skeleton)})
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)](task_type=TaskType.CAUSAL_LM, **settings)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"method={method.name}: PEFT refuses its settings: {error}") from error


def resolve_targets(wanted: str | list[str], skeleton: PreTrainedModel) -> str | list[str]:
    """Return the names of the modules to adapt, checked against the model's modules.

    `attention`, `mlp`, `q_v` and `outputs` (the last layers of attention and MLP blocks) become the model's own names
    (OPT's `out_proj`, `fc1`, ...). `all-linear` and regular expressions are unchanged, since PEFT expands them itself.

    Raises:
        ConfigError: a name, preset or regular expression matches no module.
    """
    names = [name for name, _ in skeleton.named_modules() if name]
    linear = linear_layers(skeleton)
    if isinstance(wanted, list):
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ConfigError(_matches_nothing(target, linear))
        return wanted
    if wanted == "all-linear":
        return wanted
    if wanted in PRESETS:
        attention = {name.rpartition(".")[2] for name in linear if re.search(r"attn|attention", name)}
        layers = {name.rpartition(".")[2] for name in linear}
        chosen = {
            "attention": attention,
            "mlp": layers - attention,
            "q_v": {name for name in attention if _QUERY_OR_VALUE.fullmatch(name)},
            "outputs": {name for name in layers if _OUTPUT.fullmatch(name)},
        }[wanted]
        if not chosen:
            raise ConfigError(_matches_nothing(wanted, linear))
        return sorted(chosen)
    try:
        if any(re.fullmatch(wanted, name) for name in names):
            return wanted
    except re.error as error:
        raise ConfigError(
            f"method.target_modules: '{wanted}' is neither a preset nor a valid regular expression: {error}"
        ) from error
    raise ConfigError(_matches_nothing(wanted, linear))


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the full names of the linear layers (GPT-2's Conv1D too), without the output layer."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def _matches_nothing(target: str, linear: Iterable[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    return (
        f"method.target_modules: '{target}' matches no module of this model{did_you_mean(target, [*leaves, *PRESETS])} "
        f"Its linear layers: {', '.join(leaves)}; presets: {', '.join(PRESETS)}"
    )


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
        return model.train()
    try:
        adapted = get_peft_model(model, settings)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"PEFT cannot adapt this model with {settings.peft_type}: {error}") from error
    if settings.peft_type == PeftType.ADAPTION_PROMPT:
        follow_forward_of_base(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, adapter_dtype or "float32"))
    return adapted


def base_alone(model: Any) -> AbstractContextManager[Any]:
    """Disable the adapter inside the context: an untrained prefix already changes the base model's output."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


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
