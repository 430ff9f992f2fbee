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
from qlora_exp.utils.errors import ConfigError

CPU = Device("cpu", "CPU", bf16=False, paging=False)


@pytest.fixture
def made(tmp_path):
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
def test_lora_plus_moves_b_faster_than_a(ratio: int, made):
    model, before, _ = made("optimizer=loraplus", f"optimizer.loraplus_lr_ratio={ratio}")
    assert moved(model, before, "lora_B") == pytest.approx(ratio * moved(model, before, "lora_A"), rel=0.01)


def test_lora_plus_works_on_8_bit_states(made):
    model, before, optimizer = made("optimizer=loraplus", "optimizer.optim=adamw_bnb_8bit")
    assert optimizer.args.optim_bits == 8
    assert moved(model, before, "lora_B") > 0


def test_lora_fa_never_moves_a(made):
    model, before, optimizer = made("optimizer=lorafa", "optimizer.adam_beta1=0.8")
    assert moved(model, before, "lora_A") == 0
    assert moved(model, before, "lora_B") > 0
    assert {group["betas"][0] for group in optimizer.param_groups} == {0.8}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def test_riemannian_gradients_are_scaled_by_the_other_matrix(made):
    model, before, _ = made("optimizer=riemannian", "optimizer.optim=sgd", "training.max_grad_norm=0")
    name = next(name for name in before if ".lora_B." in name)
    a = before[name.replace("lora_B", "lora_A")]
    expected = torch.ones_like(before[name]) @ torch.linalg.inv(a @ a.T + 0.01 * torch.eye(len(a)))
    step = before[name] - dict(model.named_parameters())[name]
    torch.testing.assert_close(step, 2e-4 * expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["loraplus", "lorafa", "riemannian"])
def test_a_run_uses_it_and_goes_on_with_it(name: str, run, losses):
    words = [f"optimizer={name}", "method=lora", "evaluation=loss_only", "training.max_steps=4"]
    words += ["training.save_strategy=steps", "training.save_steps=2"]
    whole = run(*words)
    plain = run("method=lora", "evaluation=loss_only", "training.max_steps=4")
    assert losses(whole)[0] == losses(plain)[0]
    assert losses(whole)[3] != losses(plain)[3]
    fewer = whole.metrics["trainable_parameters"] < plain.metrics["trainable_parameters"]
    assert fewer == (name == "lorafa")
    again = run(*words, f"training.resume_from_checkpoint={whole.output_dir}/checkpoints/checkpoint-2")
    assert losses(again) == losses(whole)[2:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ia3"], "needs a LoRA method, not method=ia3"),
        (["method=full"], "needs a LoRA method"),
        (["method=lora", "optimizer.lora_optimizer=lorafa", "optimizer.optim=sgd"], "an AdamW of its own"),
        (["method=lora", "optimizer.lora_optimizer=lorafa", "lora_variant=dora"], "trains LoRA's B only"),
        (["method=lora", "optimizer.loraplus_lr_ratio=0.5"], "greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose(["optimizer=loraplus", *words])


@pytest.mark.parametrize("words", [["lora_variant=kasa"], ["lora_variant=monteclora"], ["method.lora_bias=true"]])
def test_lora_fa_takes_what_has_an_a_and_a_b_only(words: list[str]):
    with pytest.raises(ConfigError, match="trains LoRA's B only"):
        compose(["method=lora", "optimizer=lorafa", *words])


def test_states_that_are_kept_by_name_go_where_their_parameters_are():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3, device="meta")) for _ in range(2)]
    optimizer = LoraFAOptimizer(
        [{"params": parameters, "names": ["x.lora_A.w", "x.lora_B.w"], "scaling_factors": [1, 1]}]
    )
    optimizer.state["x.lora"] = {"step": 1, "exp_avg_B": torch.zeros(2, 3)}
    move_states(optimizer)
    assert optimizer.state["x.lora"]["exp_avg_B"].device.type == "meta"
    assert optimizer.state["x.lora"]["step"] == 1
