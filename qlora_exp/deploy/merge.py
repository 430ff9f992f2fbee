"""Merge an adapter into its base model, in memory, and record the outputs before merging, to check the result against.

Works on the CPU, one layer at a time. Reads what a run saved; where memory is short, merged weights are kept in files
without a name until the model is written.
"""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig

from qlora_exp.config.schema import Config
from qlora_exp.config.tables import compatibility
from qlora_exp.data.prompts import end_renderer, render_chat, served_template
from qlora_exp.data.tokenization import prompt_tokens
from qlora_exp.deploy.formats import why_one_base
from qlora_exp.deploy.load import Saved, load_complete_model, stored_as, with_adapter
from qlora_exp.environment.device import Device, resolve
from qlora_exp.environment.memory import free
from qlora_exp.models import quantization
from qlora_exp.models.base import (
    load_model,
    load_unquantized,
    own_settings_alone,
    skeleton,
    stop_at_end_of_turn,
    stop_tokens,
)
from qlora_exp.utils.errors import ConfigError, DataError, ModelError, is_out_of_memory

log = logging.getLogger(__name__)

Base = Literal["auto", "files", "trained"]
Keep = Callable[[torch.Tensor], torch.Tensor]
_TEXT = (
    "The bridge was closed for two years. When it opened again, the people of both towns came to see what had been "
    "done: new stone, new lamps, and a narrow path for bicycles. How long does concrete need before it can carry load? "
    "Usually it is said that it takes twenty-eight days, but def f(x): return x + 1 is no answer to that."
)
_QUESTION = "How long does concrete need before it can carry load?"
_ANSWER_TOKENS = 24


@dataclass
class Whole:
    """A model without an adapter, and the outputs that it must have."""

    model: Any
    tokenizer: Any
    base: str
    """Which weights the adapter was merged into, and why."""
    ids: torch.Tensor
    """Token ids of a paragraph, (1, tokens)."""
    expected: torch.Tensor
    """Logits on `ids` before merging, from base model and adapter: (tokens, vocabulary), float32."""
    answer: list[int]
    """Token ids of the greedy answer to a fixed question before merging, in the prompt format of the training."""

    @property
    def dtype(self) -> str:
        """Dtype of the weights, such as float32."""
        return str(self.model.dtype).removeprefix("torch.")


def whole(saved: Saved, dtype: str = "auto", base: Base = "auto", scratch: Path | None = None) -> Whole:
    """Return what a run trained as a model without an adapter.

    Args:
        saved: an adapter, which is merged, or a complete model, which is used as it is.
        dtype: dtype of the merged weights: float32, bfloat16, float16; auto: that of the base model's files.
        base: weights to merge the adapter into. `trained`: those that it was trained on, dequantized if they were
            quantized, so that the result is the model that the run measured; `files`: those in the base model's files,
            which make another model of it after QLoRA; auto: `trained`.
        scratch: folder of files without a name that hold merged weights where memory is short for them; None: memory
            holds them.

    Raises:
        ConfigError: the model cannot be merged.
        ModelError: base model and adapter do not belong together, or a file is damaged.
    """
    tokenizer = saved.tokenizer()
    tokenizer.chat_template = served_template(saved.config.dataset, tokenizer)
    ids = tokenizer(_TEXT, return_tensors="pt").input_ids
    if not saved.adapter:
        if base != "auto":
            raise ConfigError(
                f"--base {base}: {saved.folder} is a complete model, not an adapter to merge; leave --base out"
            )
        model, description = load_complete_model(saved, dtype), f"{saved.source}, a whole model"
        stop_at_end_of_turn(model, saved.config.dataset, tokenizer)
        if (stored := stored_as(saved.folder)) is not None:
            if stored != "compressed-tensors":  # which are dequantized when they are loaded
                model = quantization.dequantized(model, model.dtype)
            description += f", what its weights stored by {stored} stand for"
        description += _settle_tying(model)
        return Whole(model, tokenizer, description, ids, logits(model, ids), answer(model, tokenizer))
    config = saved.config
    kind = compatibility.kind_of(config.method.kind, config.lora_variant.name)
    if why := compatibility.refusal(kind, "plain", "merge"):
        raise ConfigError(f"method={config.method.name} cannot be merged: {why}")
    bare = skeleton(config.model)
    keep = _keeper(bare, config, dtype, scratch)
    model, description = _base(bare, config, dtype, base, keep)
    stop_at_end_of_turn(model, config.dataset, tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, but the base model has {rows}: they do not belong together"
        )
    adapted = with_adapter(model, saved).eval()
    expected, answered = logits(adapted, ids), answer(adapted, tokenizer)
    end_renderer()  # it was forked with the model, so that what merging changes would be in memory twice
    model = _merged(adapted, keep)
    return Whole(model, tokenizer, description + _settle_tying(model), ids, expected, answered)


def _keeper(bare: Any, config: Config, dtype: str, scratch: Path | None) -> Keep:
    """Return what keeps a new weight: as it is, or in a file, which the system can take out of memory."""
    wanted = bare.config.dtype if dtype == "auto" else getattr(torch, dtype)
    # While it is merged, a base that was trained in 4 bits is in memory too, with the constants of its blocks.
    bytes_of_a_weight = getattr(wanted, "itemsize", 4) + 0.6 * config.quantization.quantized
    needed = sum(weight.numel() for weight in bare.parameters()) * bytes_of_a_weight
    if scratch is None or needed < free():
        return lambda weight: weight
    log.info("memory is short for %.1f GB: merged weights are kept in files in %s until they are written",
             needed / 1e9, scratch)  # fmt: skip
    return partial(_in_file, scratch)


def _in_file(folder: Path, weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight in the pages of a file, which has no name and ends with the tensor.

    Raises:
        ConfigError: the disk has no room for it.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:  # a page for which there is no room would kill this process
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, max(1, weight.nbytes))
        except OSError as error:
            raise ConfigError(f"{folder}: no room for merged weights, as memory is short: {error}") from error
        kept = torch.from_file(file.name, shared=True, size=weight.numel(), dtype=weight.dtype)
    return kept.view(weight.shape).copy_(weight)


def _base(bare: Any, config: Config, dtype: str, base: Base, keep: Keep) -> tuple[Any, str]:
    """Return the base model to merge into, and a description of which weights it has and why.

    `bare` is the base model without weights.
    """
    name, stored = config.model.model_name_or_path, config.quantization
    if not stored.quantized:
        return load_unquantized(config.model, dtype), f"{name}, as its files are"
    why = why_one_base(config)
    if base == "files" and why:
        raise ConfigError(f"--base files: {why}; use --base trained")
    if base == "files":
        return load_unquantized(config.model, dtype), (
            f"{name}, as its files are, not as {stored.name} stored them for training"
        )
    of_files = bare.config.dtype or "float32"
    model = load_model(config.model, stored, resolve(config, Device("cpu", "CPU", bf16=False, paging=False)))
    wanted = str(of_files).removeprefix("torch.") if dtype == "auto" else dtype
    only = f" ({why})" if why else ""
    return quantization.dequantized(model, getattr(torch, wanted), keep), (
        f"{name}, what its weights stored as {stored.name} stand for: what the adapter was trained on{only}"
    )


@torch.no_grad()
def _merged(adapted: PeftModel, keep: Keep) -> Any:
    """Return the base model with the adapter merged in; each layer is merged in float32 and rounded once."""
    tuner: Any = adapted.base_model
    if adapted.active_peft_config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise ConfigError(
            f"{adapted.active_peft_config.peft_type} cannot be merged: it has no weights to add to the base model's"
        )
    _part_shared_weights(adapted)
    try:
        for layer in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
            base_layer: Any = layer.get_base_layer()
            dtypes = {name: tensor.dtype for name, tensor in base_layer.named_parameters(recurse=False)}
            for name in dtypes:
                getattr(base_layer, name).data = getattr(base_layer, name).data.float()
            layer.merge(safe_merge=True)
            for name, dtype in dtypes.items():
                getattr(base_layer, name).data = keep(getattr(base_layer, name).data.to(dtype))
        merged = tuner.unload()
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"the adapter cannot be merged: {error}") from error
    merged.config.use_cache = True
    return merged


def _part_shared_weights(adapted: PeftModel) -> None:
    """Give layers that share a weight one each, since adapters change them apart.

    Shared are those of tied embeddings and output layers, which stay tied if neither is adapted, and of replicated
    layers (`layer_replication`).
    """
    modules = [*adapted.get_base_model().modules()]
    adapted_layers = {id(layer.get_base_layer()) for layer in modules if isinstance(layer, BaseTunerLayer)}
    ends = {id(end) for end in _ends(adapted.get_base_model())}
    shared = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    for module in modules:
        for name, weight in [*module.named_parameters(recurse=False)]:
            if shared[id(weight)] > 1 and (id(module) in adapted_layers or id(module) not in ends):
                shared[id(weight)] -= 1
                setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))


def _ends(model: Any) -> tuple[Any, Any]:
    """Return the embedding and the output layer of a model."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _settle_tying(model: Any) -> str:
    """Let the config say whether embedding and output layer are one matrix; return what is to be said about it.

    A config that ties two different matrices is another model to every program that reads only one of them.
    """
    configs = [model.config, model.config.get_text_config()]
    embedding, head = _ends(model)
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if not tied or head is None or head.weight is embedding.weight:
        return ""
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        return ""
    for config in configs:
        config.tie_word_embeddings = False
    return "; its output layer is no longer the embedding's matrix (tie_word_embeddings: false)"


@torch.no_grad()
def answer(model: Any, tokenizer: Any) -> list[int]:
    """Return the first tokens of the greedy answer to a fixed question, in the format of the chat template."""
    chats = bool(tokenizer.chat_template)
    ids = torch.tensor([prompt_tokens(tokenizer, _asked(tokenizer) if chats else _QUESTION, special=not chats)])
    settings = GenerationConfig(
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with own_settings_alone(model):
        generated = model.generate(**inputs, generation_config=settings, use_cache=True, tokenizer=tokenizer)
    new: list[int] = generated[0, ids.shape[1] :].tolist()
    return new


def _asked(tokenizer: Any) -> str:
    """Return the question as a prompt of the chat template, with a system message if the template needs one."""
    question = {"role": "user", "content": _QUESTION}
    try:
        return render_chat(tokenizer, [question], add_generation_prompt=True)
    except DataError:
        system = {"role": "system", "content": "Be brief."}
        return render_chat(tokenizer, [system, question], add_generation_prompt=True)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return logits, (tokens, vocabulary), float32 on the CPU, for token ids, (1, tokens)."""
    return model.eval()(input_ids=ids.to(model.device)).logits[0].float().cpu()
