"""Method and variant -> trainable parameters, through PEFT's own registry.

Knows nothing of training; `keep_dtypes` is here because the trainer would change what this module set.
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
from qlora_exp.config.schema import Config
from qlora_exp.libraries.peft import follow_forward_of_base, loss_of_adapter
from qlora_exp.utils.errors import ConfigError, did_you_mean

_UNKNOWN_STEPS = 10**9
"""AdaLoRA must be told how many steps there are before anybody knows: `fit_schedule` does."""
PRESETS = ("all-linear", "attention", "mlp", "q_v", "outputs")
_OUTPUT = re.compile(r"(o|out|c|down)_proj|wo|w2|fc2|fc_out|dense|dense_4h_to_h")
_QUERY_OR_VALUE = re.compile(r"(q|v|query|value|wq|wv)(_proj|_lin)?")


def peft_config(config: Config, skeleton: PreTrainedModel) -> PeftConfig | None:
    """PEFT's config of the method, with target modules that exist in the model; None if all parameters train.

    Args:
        config: the run's config.
        skeleton: the base model; weights are not looked at.

    Raises:
        ConfigError: PEFT refuses a setting, or target modules match nothing.
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
    unknown = config.lora_start in ("corda", "lora_ga") or config.quantization.quant_method in ("gptq", "awq")
    if settings.get("target_modules") == "all-linear" and unknown:
        # PEFT looks for their layers before it knows what this name stands for, or takes theirs for no linear ones.
        settings["target_modules"] = sorted({name.rpartition(".")[2] for name in linear_layers(skeleton)})
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)](task_type=TaskType.CAUSAL_LM, **settings)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"method={method.name}: PEFT refuses its settings: {error}") from error


def resolve_targets(wanted: str | list[str], skeleton: PreTrainedModel) -> str | list[str]:
    """Names of the modules to adapt, checked against the model's own.

    `attention`, `mlp`, `q_v` and `outputs` (what both kinds of blocks end in) become the model's own names (OPT's
    `out_proj`, `fc1`, ...); `all-linear` and regular expressions stay as they are, since PEFT reads them itself.

    Raises:
        ConfigError: something matches no module.
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
        every = {name.rpartition(".")[2] for name in linear}
        chosen = {
            "attention": attention,
            "mlp": every - attention,
            "q_v": {name for name in attention if _QUERY_OR_VALUE.fullmatch(name)},
            "outputs": {name for name in every if _OUTPUT.fullmatch(name)},
        }[wanted]
        if not chosen:
            raise ConfigError(_matches_nothing(wanted, linear))
        return sorted(chosen)
    try:
        if any(re.fullmatch(wanted, name) for name in names):
            return wanted
    except re.error as error:
        raise ConfigError(f"method.target_modules: '{wanted}' is no regular expression: {error}") from error
    raise ConfigError(_matches_nothing(wanted, linear))


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers (GPT-2's Conv1D too), the output layer left out."""
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
    """The model with trainable parameters: all of its own, or an adapter's in `adapter_dtype`.

    Raises:
        ConfigError: PEFT cannot adapt this model so.
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
    """Inside, the model without its adapter: with a prefix that has learned nothing yet it is not the base."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def penalty(model: Any) -> torch.Tensor | float:
    """What KaSA and MonteCLoRA add to the loss while they learn; 0 for all others."""
    if not isinstance(model, PeftModel) or model.active_peft_config.peft_type != PeftType.LORA:
        return 0.0
    return loss_of_adapter(model.base_model)


def allocates(model: Any) -> bool:
    """Whether a method moves its budget while it learns (AdaLoRA, AdaMSS).

    PEFT then wants `update_and_allocate` of its tuner called after each optimizer step, which TRL does not do.
    """
    return isinstance(model, PeftModel) and hasattr(type(model.base_model), "update_and_allocate")


def fit_schedule(model: Any, steps: int) -> None:
    """Tell AdaLoRA how many steps a training has; of other methods nothing.

    Raises:
        ConfigError: they are too few for its schedule.
    """
    settings = model.peft_config[model.active_adapter]
    if settings.peft_type != PeftType.ADALORA:
        return
    if settings.tinit + settings.tfinal >= steps:
        raise ConfigError(
            f"method.tinit={settings.tinit} and method.tfinal={settings.tfinal} steps without a change "
            f"of ranks leave none of {steps} training steps"
        )
    settings.total_step = steps


@contextmanager
def keep_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """Undo what happens inside to trainable values.

    TRL 1.16's SFTTrainer rounds the adapters of a quantized base to bfloat16, and only those: a comparison of LoRA
    with QLoRA would compare precisions too.
    """
    values = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name]


def make_portable(folder: Path, base_model: str) -> None:
    """Take out of a saved model what holds on this machine only.

    The trainer's pickled arguments and PEFT's card skeleton go; the adapter names its base as the config does.
    """
    for name in ("training_args.bin", "README.md"):
        (folder / name).unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    if file.is_file():
        values = json.loads(file.read_text("utf-8")) | {"base_model_name_or_path": base_model}
        file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and total parameters; a 4-bit weight counts for what it stands for, as PEFT counts."""
    trainable, total = PeftModel.get_nb_trainable_parameters(model)
    # Weights that GPTQModel's layers keep are no parameters.
    packed = (layer for layer in model.modules() if hasattr(layer, "qzeros") and hasattr(layer, "in_features"))
    return trainable, total + sum(layer.in_features * layer.out_features for layer in packed)
