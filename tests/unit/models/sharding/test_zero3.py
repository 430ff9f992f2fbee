"""A model that ZeRO-3 divides computes, saves and loads what the whole one does; here with a single process."""

import math
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch
from torch import distributed

from qlora_exp.environment.device import detect, resolve
from qlora_exp.models import adapters, base
from qlora_exp.models.sharding import fsdp, zero3

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")


@pytest.fixture(scope="module")
def _one_process():
    """One for all tests: DeepSpeed keeps what it has learned of the processes."""
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, str(value))
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # DeepSpeed has one of its own
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


def trained(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Branches(torch.nn.Module):
    """Two layers, of which a batch may use only the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return (self.second(self.first(x)) if both else self.first(x)).square().sum()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("cpu_offload", [False, True])
def test_parameter_without_a_gradient_does_not_get_that_of_the_step_before(cpu_offload):
    whole, model, x = Branches(), Branches(), torch.ones(2, 3)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (whole, model)]
    engine = zero3.partition(model, optimizers[1], "cpu", 0.0, cpu_offload)
    for both in (True, False, True):
        optimizers[0].zero_grad()
        whole(x, both).backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in whole.parameters() if each.grad is not None])
        optimizers[0].step()
        engine(x, both).backward()
        assert zero3.step(engine) == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(fsdp.whole_weights(model, {*whole.state_dict()}), whole.state_dict())


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("cpu_offload", [False, True])
def test_divided_model_is_the_same_model(make_config, cpu_offload):
    config = make_config("method=lora", "method.lora_dropout=0")
    resolved = resolve(config, detect("cpu"))

    def build():
        model = base.load_model(config.model, config.quantization, resolved)
        settings = adapters.peft_config(config, base.skeleton(config.model))
        torch.manual_seed(0)
        return adapters.attach(model, settings, resolved.adapter_dtype)

    def optimizer(model) -> torch.optim.Optimizer:  # the group without parameters is kept too
        return torch.optim.AdamW([{"params": [], "weight_decay": 0.5}, {"params": trained(model)}], lr=0.01, eps=1e-3)

    ids, whole, model = torch.arange(40, 60)[None], build(), build()
    names, own, divided = adapters.saved_parameters(model), optimizer(whole), optimizer(model)
    engine = zero3.partition(model, divided, "cpu", 0.1, cpu_offload)
    assert fsdp.is_sharded(model)
    assert not fsdp.is_sharded(whole)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert adapters.count_parameters(model) == adapters.count_parameters(whole)

    def both_train() -> None:
        for _ in range(2):  # accumulated
            loss = whole(input_ids=ids, labels=ids).loss
            loss.backward()
            again = engine(input_ids=ids, labels=ids).loss
            again.backward()
            torch.testing.assert_close(again, loss)
        norm = torch.nn.utils.clip_grad_norm_(trained(whole), 0.1)
        own.step()
        own.zero_grad()
        assert zero3.step(engine) == pytest.approx(float(norm), rel=1e-5)
        divided.step()  # the trainer calls it too
        saved, same = fsdp.whole_weights(model, names), whole.state_dict()
        assert saved.keys() == {name for name in same if ".lora_" in name}
        torch.testing.assert_close(saved, {name: same[name] for name in saved})
        assert all(parameter.numel() == 0 for parameter in model.parameters())

    both_train()
    both_train()
    assert divided.state_dict()["param_groups"] == own.state_dict()["param_groups"]
    torch.testing.assert_close(divided.state_dict()["state"], own.state_dict()["state"])

    first, states = deepcopy((whole.state_dict(), own.state_dict()))
    both_train()
    for one, saved in ((whole, own), (model, divided)):
        one.load_state_dict({name: first[name] for name in names}, strict=False)
        saved.load_state_dict(states)
    both_train()
    engine(input_ids=ids, labels=ids).loss.mul(math.nan).backward()
    assert math.isnan(zero3.step(engine))
