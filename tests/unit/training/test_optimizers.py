"""PEFT's optimizers for LoRA do what their papers say, under the trainer."""

import pytest
import torch
from peft.optimizers.lorafa import LoraFAOptimizer

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import adapters
from qlora_exp.models.base import load_model
from qlora_exp.training.arguments import arguments
from qlora_exp.training.optimizers import lora_optimizer, move_states

CPU = Device("cpu", "CPU", bf16=False, paging=False)


@pytest.fixture
def step_once(tmp_path):
    """A LoRA model with an optimizer, after one step on a gradient of ones."""

    def make(*overrides: str):
        config = compose(["device=cpu", "model=tiny_llama", "method=lora", *overrides])
        resolved = resolve(config, CPU)
        base = load_model(config.model, config.quantization, resolved)
        model = adapters.attach(base, adapters.peft_config(config, base), "float32")
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = lora_optimizer(model, config.optimizer, arguments(config, resolved, tmp_path))
        assert optimizer is not None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return model, before, optimizer

    return make


def moved(model, before, kind: str) -> float:
    """The mean size of the step of LoRA's A or B."""
    steps = [(p - before[name]).abs().mean() for name, p in model.named_parameters() if f".{kind}." in name]
    return torch.stack(steps).mean().item()


@pytest.mark.parametrize("ratio", [4, 16])
def test_lora_plus_moves_b_faster_than_a(ratio: int, step_once):
    model, before, _ = step_once("optimizer=loraplus", f"optimizer.loraplus_lr_ratio={ratio}")
    assert moved(model, before, "lora_B") == pytest.approx(ratio * moved(model, before, "lora_A"), rel=0.01)


def test_lora_plus_supports_8_bit_states(step_once):
    model, before, optimizer = step_once("optimizer=loraplus", "optimizer.optim=adamw_bnb_8bit")
    assert optimizer.args.optim_bits == 8
    assert moved(model, before, "lora_B") > 0


def test_lora_fa_never_moves_a(step_once):
    model, before, optimizer = step_once("optimizer=lorafa", "optimizer.adam_beta1=0.8")
    assert moved(model, before, "lora_A") == 0
    assert moved(model, before, "lora_B") > 0
    assert {group["betas"][0] for group in optimizer.param_groups} == {0.8}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def test_riemannian_gradient_is_scaled_by_the_other_matrix(step_once):
    model, before, _ = step_once("optimizer=riemannian", "optimizer.optim=sgd", "training.max_grad_norm=0")
    name = next(name for name in before if ".lora_B." in name)
    a = before[name.replace("lora_B", "lora_A")]
    expected = torch.ones_like(before[name]) @ torch.linalg.inv(a @ a.T + 0.01 * torch.eye(len(a)))
    step = before[name] - dict(model.named_parameters())[name]
    torch.testing.assert_close(step, 2e-4 * expected, rtol=1e-3, atol=1e-6)


def test_named_optimizer_states_move_with_their_parameters():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3, device="meta")) for _ in range(2)]
    optimizer = LoraFAOptimizer(
        [{"params": parameters, "names": ["x.lora_A.w", "x.lora_B.w"], "scaling_factors": [1, 1]}]
    )
    optimizer.state["x.lora"] = {"step": 1, "exp_avg_B": torch.zeros(2, 3)}
    move_states(optimizer)
    assert optimizer.state["x.lora"]["exp_avg_B"].device.type == "meta"
    assert optimizer.state["x.lora"]["step"] == 1
