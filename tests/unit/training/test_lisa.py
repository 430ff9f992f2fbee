"""LISA draws layers by seed and step, keeps states of trained parameters only, and trains all in the end."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.tables.compatibility import WORKS
from qlora_exp.models.adapters import trainable_set
from qlora_exp.models.base import load_unquantized
from qlora_exp.studies import probe
from qlora_exp.training.lisa import SampledLayers
from qlora_exp.utils.errors import ConfigError


def model_of(layers: int):
    return load_unquantized(ModelConfig(model_name_or_path="random:llama", random_config={"num_hidden_layers": layers}))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5))
def test_draws_depend_on_seed_and_period_only(seed: int, count: int, interval: int):
    decoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))})
    stand_in = SimpleNamespace(get_decoder=lambda: decoder)
    first, second = (SampledLayers(stand_in, count, interval, seed) for _ in range(2))
    for step in range(12):
        layers = first.layers(step)
        assert layers == second.layers(step - step % interval)
        assert len({*layers}) == count
        assert {*layers} <= {*range(4)}


def test_states_are_those_of_the_trained_parameters_in_every_step():
    model = model_of(4)
    optimizer = torch.optim.AdamW(model.parameters())
    sampled = SampledLayers(model, 1, 2, seed=3)
    state = SimpleNamespace(global_step=0)
    sampled.on_train_begin(None, state, None, optimizer=optimizer)
    drawn = set()
    for step in range(8):
        state.global_step = step
        sampled.on_step_begin(None, state, None, optimizer=optimizer)
        model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        optimizer.step()
        names = trainable_set(model)
        assert {p for n, p in model.named_parameters() if n in names} == {*optimizer.state}
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names
        drawn |= {name.split(".")[2] for name in names if ".layers." in name}
        optimizer.zero_grad()
    assert len(drawn) > 1
    sampled.on_train_end(None, state, None)
    assert trainable_set(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer=muon"], "does not allow for: use optimizer=adamw_torch"),
        (
            ["distributed=ddp", "distributed.num_processes=2"],
            "distributed=ddp cannot train method=lisa (the processes do not follow",
        ),
        (["training.torch_compile=true"], "was never tested"),
        (["method.lisa_interval_steps=30"], "draws layers once"),
    ],
)
def test_what_lisa_cannot_do_is_refused_by_name(words: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(["method=lisa", *words])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_resumed_run_trains_the_same_layers_with_the_same_losses():
    assert probe.verdicts(("method=lisa",), "plain", ["resume"]) == {"resume": WORKS}
