"""Tiles of tokens: losses and gradients of the whole row, in the memory of a tile."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.models.base import skeleton
from qlora_exp.models.builtin import TINY
from qlora_exp.models.layers import tiling
from qlora_exp.models.trained import layers_of
from qlora_exp.utils.errors import ConfigError

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "phi3", "falcon", "gpt_neox", "bloom"]
"""With separate, fused and biased layers, other names, norms of heads, and MLPs that also take the residual."""
TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WITHOUT_MLP = {"opt": "no MLP", "mamba": "no MLP", "mixtral": "mixture of experts", "deepseek_v3": "mixture of experts",
               "gpt_oss": "mixture of experts", "jamba": "mixture of experts"}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "LEAST", 64)
    monkeypatch.setattr(tiling, "TILES", 4)


def made(family: str, dropout: float | None = None) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY[family], **TOKENS))
    if dropout is not None:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would hide errors of A's gradients
                torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and dropout is None:
            module.p = 0.0
    return model.train()


def gradients(model: Any, half: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and gradients of two rows, the second padded, in three tiles of 32 tokens of each."""
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (2, 75))
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    output.loss.backward()
    taken = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return output.loss.detach(), torch.cat(taken)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_whole_rows(family: str):
    model = made(family)
    expected, whole = gradients(model)
    tiling.tile(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, tiled = gradients(model)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-7)
        assert torch.cosine_similarity(tiled.double(), whole.double(), dim=0) > 1 - 1e-10


def test_adapters_learn_the_same_under_autocast_to_bfloat16():
    model = made("llama", dropout=0.0)
    expected, whole = gradients(model, half=True)
    exact = gradients(model)[1]
    tiling.tile(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, tiled = gradients(model, half=True)
    assert abs(loss - expected) < 2e-3
    rounding = 1 - torch.cosine_similarity(whole, exact, dim=0)
    assert 1 - torch.cosine_similarity(tiled, whole, dim=0) < 2 * rounding


def test_recomputed_tiles_have_the_same_dropout(monkeypatch: pytest.MonkeyPatch):
    again, kept = made("llama", dropout=0.3), made("llama", dropout=0.3)
    tiling.tile(again)
    again.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(tiling, "_recomputed", lambda compute, *inputs, **settings: compute(*inputs, **settings))
    tiling.tile(kept)
    for one, other in zip(gradients(again), gradients(kept), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("length", "parts"), [(64, [64]), (150, [64, 64, 22]), (400, [100] * 4)])
def test_tiles_are_few_and_not_small_and_evaluation_has_them_too(length: int, parts: list[int]):
    model, lengths = made("llama").eval(), []
    for layer in layers_of(model):
        layer.mlp.gate_proj.register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[1]))
    ids = torch.arange(length)[None] % 97
    with torch.no_grad():
        whole = model(ids).logits
        tiling.tile(model)
        lengths.clear()
        torch.testing.assert_close(model(ids).logits, whole)
    assert lengths == parts * 2


@pytest.mark.parametrize("family", WITHOUT_MLP)
def test_models_without_such_blocks_are_refused_by_name(family: str):
    bare = skeleton(ModelConfig(model_name_or_path=f"random:{family}"))
    with pytest.raises(ConfigError, match=rf"training.tiled_mlp: .*\({family}\).*{WITHOUT_MLP[family]}"):
        tiling.check(bare)


@pytest.mark.thorough
@pytest.mark.parametrize("family", sorted({*TINY} - {*FAMILIES}))
def test_every_family_is_tiled_exactly_or_refused(family: str):
    model = made(family)
    untiled = deepcopy(model)
    try:
        tiling.tile(model)
    except ConfigError:
        return
    expected, whole = gradients(untiled)
    loss, tiled = gradients(model)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.cosine_similarity(tiled.double(), whole.double(), dim=0) > 1 - 1e-9
