"""Optimizers for full fine-tuning on little memory: what they update, with which settings, and what they keep."""

from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.models.base import load_unquantized
from qlora_exp.models.trained import projected_weights
from qlora_exp.studies import probe
from qlora_exp.training import own_optimizers
from qlora_exp.utils.errors import ConfigError

MODULES = {
    "adam_mini": "adam_mini",
    "galore_adamw": "galore_torch",
    "apollo_adamw": "apollo_torch",
    "stable_adamw": "optimi",
}
MODULES |= dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), "schedulefree")
MODULES |= dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "torchao")


def made(*words: str, decay: float = 0.1):
    """A tiny model and its optimizer, with gradients."""
    config = compose(["device=cpu", "model=tiny_llama", "method=full", *words])
    model = load_unquantized(config.model)
    optimizer = own_optimizers.build(model, config.optimizer, 1e-2, decay)
    give_gradients(model)
    return model, optimizer


def give_gradients(model) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None


def of(optimizer, model, key: str) -> dict[str, object]:
    """A setting of the group of each parameter."""
    values = {id(p): group.get(key) for group in optimizer.param_groups for p in group["params"]}
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optim", ["muon", *MODULES])
def test_every_trained_parameter_is_updated_once_with_its_weight_decay(optim: str):
    pytest.importorskip(MODULES.get(optim, "torch"))
    model, optimizer = made(f"optimizer={optim}")
    decays = of(optimizer, model, "weight_decay")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays)
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in decays if "norm" in name}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.compiler.set_stance("force_eager")  # torchao's steps: compiling takes half a minute
    try:
        if hasattr(optimizer, "train"):
            optimizer.train()
        for _ in range(6):  # RAdam changes nothing in the first five
            optimizer.step()
    finally:
        torch.compiler.set_stance("default")
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_muon_updates_matrices_inside_layers_and_adamw_the_rest():
    model, optimizer = made("optimizer=muon", "optimizer.adam_beta1=0.7")
    steps = of(optimizer, model, "ns_steps")
    assert {name for name, value in steps.items() if value} == {name for name in steps if name.endswith("proj.weight")}
    assert {betas for betas in of(optimizer, model, "betas").values() if betas} == {(0.7, 0.999)}


def test_muon_step_is_that_of_its_two_parts():
    model, optimizer = made("optimizer=muon")
    other, _ = made("optimizer=muon")
    matrices = [p for n, p in other.named_parameters() if n.endswith("proj.weight")]
    norms = [p for n, p in other.named_parameters() if "norm" in n]
    tables = [p for n, p in other.named_parameters() if "norm" not in n and not n.endswith("proj.weight")]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": tables, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0}], lr=1e-2)
    for _ in range(2):
        for each in (model, other):
            give_gradients(each)
        for each in (optimizer, muon, adamw):
            each.step()
    for (name, actual), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_muon_goes_on_from_its_saved_states_and_follows_schedules(tmp_path):
    model, optimizer = made("optimizer=muon")
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other, again = made("optimizer=muon")
    other.load_state_dict(model.state_dict())
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for each in (optimizer, again):
        for group in each.param_groups:
            group["lr"] = 1e-3
    for each in (model, other):
        give_gradients(each)
    optimizer.step()
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert own_optimizers.state_bytes(again) == own_optimizers.state_bytes(optimizer)


def adam_mini(family: str, **fields):
    """A tiny model of a family, and its Adam-mini."""
    pytest.importorskip("adam_mini")
    model = load_unquantized(ModelConfig(model_name_or_path=f"random:{family}", random_config=fields))
    with patch.object(torch.cuda, "device_count", return_value=2):  # for which its package calls other processes
        return model, own_optimizers.build(model, OptimizerConfig(optim="adam_mini"), 1e-2, 0.1)


@pytest.mark.parametrize(
    ("family", "fields", "size"), [("llama", {}, 16), ("opt", {}, 16), ("qwen3", {"head_dim": 32}, 32)]
)
def test_adam_mini_has_one_second_moment_for_each_block_of_the_paper(family: str, fields: dict, size: int):
    model, optimizer = adam_mini(family, **fields)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first, second = ({name: torch.zeros(()) for name in expected} for _ in range(2))
    for step in (1, 2, 3):
        give_gradients(model)
        optimizer.step()
        for name, parameter in model.named_parameters():
            values = parameter.grad
            if "norm" in name and not name.endswith("bias"):
                blocks = values.reshape(1, -1)
            elif name.endswith("bias"):
                blocks = values.reshape(-1, 1)
            else:
                blocks = values.reshape(-1, size * 64 if "q_proj" in name or "k_proj" in name else values.shape[1])
            mean = (blocks**2).mean(1, keepdim=True).expand_as(blocks).reshape(values.shape)
            first[name] = 0.9 * first[name] + 0.1 * values
            second[name] = 0.999 * second[name] + 0.001 * mean
            change = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            decay = 0 if "norm" in name or name.endswith("bias") else 0.1
            expected[name] = expected[name] * (1 - 1e-2 * decay) - 1e-2 * change
            torch.testing.assert_close(parameter.detach(), expected[name], msg=f"{name}, step {step}")


def test_adam_mini_goes_on_from_its_saved_states(tmp_path):
    model, optimizer = adam_mini("qwen2")
    other, again = adam_mini("qwen2")
    give_gradients(model)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other.load_state_dict(model.state_dict())
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for each in (model, other):
        give_gradients(each)
    optimizer.step()
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert own_optimizers.state_bytes(again) == own_optimizers.state_bytes(optimizer)


def test_muon_without_a_matrix_is_refused():
    config = compose(["model=tiny_llama", "method=full", "optimizer=muon"])
    model = load_unquantized(config.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(ConfigError, match="no matrix inside the layers is trained"):
        own_optimizers.build(model, config.optimizer, 1e-2, 0.0)


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw"])
def test_projected_states_are_small_and_settings_reach_all_groups(optim: str):
    pytest.importorskip(MODULES[optim])
    words = [f"optimizer={optim}", "optimizer.optim_args.rank=4", "optimizer.adam_beta2=0.9"]
    model, optimizer = made(*words, "optimizer.optim_target_modules=mlp")
    ranks = of(optimizer, model, "rank")
    assert {name for name, rank in ranks.items() if rank == 4} == {name for name in ranks if ".mlp." in name}
    assert {*of(optimizer, model, "betas").values()} == {(0.9, 0.9)}
    optimizer.step()
    state = optimizer.state[model.model.layers[0].mlp.up_proj.weight]
    assert 4 in state["exp_avg"].shape


def test_a_rank_that_saves_nothing_is_said(caplog):
    pytest.importorskip("galore_torch")
    made("optimizer=galore_adamw", "optimizer.optim_args.rank=32")
    assert "rank=32 saves nothing in 4 of 14 matrices" in caplog.text


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("gate_proyy", "'gate_proyy' matches no linear layer"),
        ("[mlp.up_proj,lm_head]", "'lm_head' matches no linear layer"),
        ("'.*('", "not a valid regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets: str, message: str):
    config = compose(["model=tiny_llama", "method=full", "optimizer=galore_adamw",
                      f"optimizer.optim_target_modules={targets}"])  # fmt: skip
    with pytest.raises(ConfigError, match="optimizer.optim_target_modules: .*") as error:
        projected_weights(load_unquantized(config.model), config.optimizer)
    assert message in str(error.value)


def test_state_bytes_count_each_storage_once():
    parameter = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([parameter])
    shared = torch.zeros(6)
    optimizer.state[parameter] = {"a": shared, "b": shared[:2], "c": {"d": [torch.zeros(3)]}, "step": 4}
    assert own_optimizers.state_bytes(optimizer) == 4 * (6 + 3)


def test_state_bytes_count_states_in_few_bits():
    pytest.importorskip("torchao")
    from torchao.optim.subclass_8bit import OptimState8bit

    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"a": OptimState8bit.zeros((4096,), signed=True, block_size=256)}
    assert own_optimizers.state_bytes(optimizer) == 4096 + 4 * 16 + 4 * 256


@pytest.mark.thorough
def test_resumed_adam_mini_is_the_uninterrupted_one(tmp_path):
    pytest.importorskip("adam_mini")
    words = ["training.save_strategy=steps", "training.save_steps=2"]
    trial = probe._Trial(["method=full", "optimizer=adam_mini"], "plain")
    whole, losses = trial.train(tmp_path, *words)
    again, rest = trial.train(tmp_path / "again", *words, checkpoint=tmp_path / "checkpoint-2")
    assert rest == losses[2:]
    assert own_optimizers.state_bytes(again.optimizer) == own_optimizers.state_bytes(whole.optimizer)
    for kept, resumed in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(kept, resumed)


@pytest.mark.slow
def test_averages_are_what_is_saved_evaluated_and_resumed(tmp_path):
    pytest.importorskip("schedulefree")
    words = [f"training.{key}" for key in ("save_strategy=steps", "save_steps=2", "warmup_steps=0.5")]
    words += ["training.eval_strategy=steps", "training.eval_steps=2"]
    trial = probe._Trial(["method=full", "optimizer=schedule_free_adamw"], "plain")
    trainer, losses = trial.train(tmp_path, *words)
    assert {group["warmup_steps"] for group in trainer.optimizer.param_groups} == {2}  # of four steps
    assert {group["train_mode"] for group in trainer.optimizer.param_groups} == {False}
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in trainer.model.named_parameters())
    measured = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == measured[-1]
    _, rest = trial.train(tmp_path / "again", *words, checkpoint=tmp_path / "checkpoint-2")
    assert rest == losses[2:]
