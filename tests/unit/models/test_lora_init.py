"""How LoRA starts, from training rows or from the base's weights, and that what is saved fits the published base."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.tables import compatibility
from qlora_exp.data.rows import load_rows
from qlora_exp.data.tokenization import tokenize
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import adapters, lora_init, targets
from qlora_exp.models.base import load_model, load_unquantized
from qlora_exp.utils.errors import ConfigError

CPU = Device("cpu", "CPU", bf16=False, paging=False)
IDS = torch.arange(40, 72)[None]


@pytest.fixture
def make_batches(tiny_tokenizer):
    def batches(config) -> list:
        tokens = tokenize(load_rows(config.dataset).train, config, tiny_tokenizer)
        size = 1 if config.lora_start == "corda" else 4
        return lora_init.batches(tokens, 8, size, 1024, tiny_tokenizer.pad_token_id)

    return batches


@pytest.fixture
def make_lora(make_batches):
    """A tiny base with a LoRA that started as the overrides say, and the same base as it was."""

    def start(*overrides: str):
        config = compose(["model=tiny_llama", "method=lora", "dataset.max_train_rows=8", *overrides])
        resolved = resolve(config, CPU)
        base, untouched = (load_model(config.model, config.quantization, resolved) for _ in range(2))
        torch.manual_seed(0)
        settings = adapters.peft_config(config, base)
        found = make_batches(config)
        lora_init.prepare(config.lora_start, base, settings, found)
        adapted = adapters.attach(base, settings, "float32")
        lora_init.finish(config.lora_start, adapted, found, lambda: load_unquantized(config.model))
        return adapted.eval(), untouched.eval(), found

    return start


def layers(adapted) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in adapted.base_model.model.named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("variant", ["pissa", "olora", "corda", "lora_ga", "eva", "orthogonal", "mica"])
def test_lora_initialization_does_not_change_the_output(variant: str, make_lora):
    rank = 2 if variant == "eva" else 16  # it takes time to converge
    adapted, untouched, _ = make_lora(f"lora_variant={variant}", f"method.r={rank}")
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, untouched(IDS).logits, rtol=1e-3, atol=1e-4)


def test_pissa_moves_the_largest_singular_values_out_of_the_base(make_lora):
    adapted, untouched, _ = make_lora("lora_variant=pissa", "method.r=4")
    for name, layer in layers(adapted).items():
        values = torch.linalg.svdvals(untouched.get_submodule(name).weight)
        left = torch.linalg.svdvals(layer.get_base_layer().weight)
        torch.testing.assert_close(left[: len(values) - 4], values[4:], rtol=1e-3, atol=1e-4)
        assert left[0] < values[0]


def test_lora_ga_starts_along_the_gradient_of_the_full_weights(make_lora):
    adapted, untouched, found = make_lora("lora_variant=lora_ga", "method.r=2", "method.target_modules=q_v")
    for batch in found:
        untouched(**batch).loss.backward()
    for name, layer in layers(adapted).items():
        gradient = untouched.get_submodule(name).weight.grad
        _, _, right = torch.linalg.svd(gradient)
        a = layer.lora_A["default"].weight.detach()
        inside = (a @ right[:4].T).norm() / a.norm()  # the 2r largest directions
        assert inside > 0.999


def test_eva_distributes_ranks_within_the_budget(make_lora):
    adapted, untouched, _ = make_lora("lora_variant=eva", "method.r=4")
    found = layers(adapted)
    ranks = [layer.r["default"] for layer in found.values()]
    # Layers whose input is the same share their directions; a layer of rank 0 is no LoRA any more.
    assert sum(ranks) == 4 * len(targets.linear_layers(untouched))
    assert len(set(ranks)) > 1
    for layer in found.values():
        a = layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantization", ["nf4_double", "fp4", "int8"])
@pytest.mark.parametrize("alpha", [4, 32])
def test_loftq_compensates_quantization_as_well_as_its_rank_allows(quantization: str, alpha: int, make_lora):
    adapted, _, _ = make_lora(
        "lora_variant=loftq", f"quantization={quantization}", "method.r=4", f"method.lora_alpha={alpha}"
    )
    weights = dict(load_unquantized(compose(["model=tiny_llama"]).model).named_parameters())
    for name, layer in layers(adapted).items():
        lost = weights[f"{name}.weight"].float() - dequantize_module_weight(layer.get_base_layer()).float()
        left = (lost - layer.get_delta_weight("default")).norm()
        best = torch.linalg.svdvals(lost)[4:].norm()  # Eckart and Young
        torch.testing.assert_close(left, best, rtol=1e-3, atol=1e-5)


def test_loftq_makes_up_for_all_of_a_layer_that_is_narrower_than_its_rank(make_lora):
    """As the gates of Qwen3.5's linear attention are, with one output for each head."""
    adapted, _, _ = make_lora("lora_variant=loftq", "quantization=nf4", "method.r=48", "method.target_modules=[k_proj]")
    weights = dict(load_unquantized(compose(["model=tiny_llama"]).model).named_parameters())
    for name, layer in layers(adapted).items():
        stored = dequantize_module_weight(layer.get_base_layer()).float()
        assert min(stored.shape) < 48
        made = stored + layer.get_delta_weight("default")
        torch.testing.assert_close(made, weights[f"{name}.weight"].float(), rtol=1e-4, atol=1e-5)
        assert layer.lora_A["default"].weight.any(dim=1).all()  # else the rest could never learn


def test_too_few_rows_for_a_rank_are_rejected(make_lora):
    with pytest.raises(ConfigError, match="no batch of the first training rows has the 4000 tokens"):
        make_lora("lora_variant=eva", "method.r=2000")


def test_eva_directions_that_do_not_converge_are_rejected(make_lora, monkeypatch):
    monkeypatch.setattr(lora_init, "_EVA_PASSES", 1)
    with pytest.raises(ConfigError, match="not converged after 1 passes over 2 batches"):
        make_lora("lora_variant=eva")


def test_saved_adapter_is_the_difference_from_the_initialization(make_lora, tmp_path):
    adapted, untouched, _ = make_lora("lora_variant=pissa", "method.r=4", "method.use_rslora=true")
    lora_init.remember("pissa", adapted, tmp_path / "first")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    lora_init.save_difference(adapted, tmp_path / "saved", tmp_path / "first")
    again = PeftModel.from_pretrained(untouched, tmp_path / "saved").eval()
    assert again.peft_config["default"].r == 8
    assert again.peft_config["default"].init_lora_weights is True
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, rtol=1e-3, atol=1e-4)


def test_run_resumes_only_from_the_same_initialization(make_lora, tmp_path):
    adapted, _, _ = make_lora("lora_variant=pissa", "method.r=4")
    assert lora_init.remember("pissa", adapted, tmp_path / "first")
    assert lora_init.remember("pissa", adapted, tmp_path / "first")
    next(p for p in adapted.parameters() if p.requires_grad).data *= -1
    assert not lora_init.remember("pissa", adapted, tmp_path / "first")


def test_stored_initialization_of_another_config_is_removed(make_lora, tmp_path):
    lora_init.remember("pissa", make_lora("lora_variant=pissa")[0], tmp_path / "first")
    assert lora_init.remember(None, make_lora("lora_variant=lora")[0], tmp_path / "first")
    assert not (tmp_path / "first").exists()


def test_loftq_leaves_unquantized_layers_unchanged(make_lora):
    with compatibility.ignored():  # an adapter on the output layer, which is not quantized, would not learn
        adapted, _, _ = make_lora("lora_variant=loftq", "quantization=nf4", "method.target_modules=[q_proj,lm_head]")
    found = layers(adapted)
    assert found["lm_head"].lora_B["default"].weight.abs().max() == 0
    assert found["model.layers.0.self_attn.q_proj"].lora_B["default"].weight.abs().max() > 0


def test_initialization_that_keeps_the_base_is_not_stored(make_lora, tmp_path):
    lora_init.remember("eva", make_lora("lora_variant=eva", "method.r=2")[0], tmp_path / "first")
    assert not (tmp_path / "first").exists()
