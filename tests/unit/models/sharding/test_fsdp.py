"""A sharded model computes, saves and loads what the whole one does; here with a single process."""

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from qlora_exp.environment.device import detect, resolve
from qlora_exp.models import adapters, base
from qlora_exp.models.sharding import fsdp
from qlora_exp.utils.errors import ConfigError


@pytest.fixture
def build(make_config):
    def built(*words):
        config = make_config(*words)
        resolved = resolve(config, detect("cpu"))
        model = base.load_model(config.model, config.quantization, resolved)
        settings = adapters.peft_config(config, base.skeleton(config.model))
        return adapters.attach(model, settings, resolved.adapter_dtype)

    return built


@pytest.fixture
def _one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_sharded_model_is_the_same_model(build):
    model, ids = build("method=lora", "method.lora_dropout=0"), torch.arange(40, 60)[None]
    names, whole = adapters.saved_parameters(model), {k: v.clone() for k, v in model.state_dict().items()}
    before = model(input_ids=ids, labels=ids).loss
    fsdp.shard(model, "cpu")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    fsdp.save_whole_states(optimizer)
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, before)
    loss.backward()
    optimizer.step()

    saved = fsdp.whole_weights(model, names)
    assert saved.keys() == {name for name in whole if ".lora_" in name}
    assert any(not saved[name].equal(whole[name]) for name in saved)
    model.load_state_dict({name: whole[name] for name in saved}, strict=False)
    again = fsdp.whole_weights(model, names)
    assert all(again[name].equal(whole[name]) for name in saved)

    state = optimizer.state_dict()
    assert not any(isinstance(value, DTensor) for each in state["state"].values() for value in each.values())
    optimizer.load_state_dict(state)
    first = next(iter(optimizer.state.values()))
    assert isinstance(first["exp_avg"], DTensor)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"])


def test_model_that_cannot_be_sharded_is_refused(build):
    with pytest.raises(ConfigError, match="shares parameters between layers"):
        fsdp.shard(build("method=vblora"), "cpu")
    model = build("method=lora")
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    trained.data = trained.data.bfloat16()
    with pytest.raises(ConfigError, match=r"trains parameters in torch\.bfloat16 and torch\.float32"):
        fsdp.shard(model, "cpu")
    with pytest.raises(ConfigError, match="no transformer layers"):
        fsdp.shard(torch.nn.Linear(2, 2), "cpu")


def test_parameters_of_an_adapter_are_saved(build):
    assert all("lora_" in name for name in adapters.saved_parameters(build("method=lora")))
    assert all("prompt_encoder" in name for name in adapters.saved_parameters(build("method=prompt_tuning")))
    full = build("method=full")
    assert adapters.saved_parameters(full) == {name for name, _ in full.named_parameters(remove_duplicate=False)}
