"""A recording is what the code allocates, and a deepened one is that of the deeper model, event by event."""

from collections import Counter
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models.base import model_config
from qlora_exp.models.layers import tiling
from qlora_exp.models.trained import recompute_first
from qlora_exp.planning import planner, step
from qlora_exp.planning.recording.deepen import IrregularError, deepen, stand_ins
from qlora_exp.planning.recording.fake_tensors import (
    LAYERS,
    Event,
    Recorder,
    Recording,
    materialize,
)

GPU = Device("cuda", "GPU", bf16=True, paging=True)
ARCHITECTURE = (
    "+model.architecture={_name_or_path: random:llama, model_type: llama, vocab_size: 512, hidden_size: 64,"
    " intermediate_size: 128, num_hidden_layers: 8, num_attention_heads: 4, num_key_value_heads: 2}"
)


def recorded(layers: int, *words: str, recomputed: int | None = None) -> Recording:
    config = compose(["model=tiny_llama", "method=lora", ARCHITECTURE, *words])
    resolved = resolve(config, GPU)
    model = planner.build_model(config, resolved, model_config(config.model), layers)
    if recomputed is not None:
        recompute_first(model, recomputed)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with planner.as_it_runs(on_cuda=True):
        return step._passes(
            model,
            mode,
            step.Batch(2, 32, True),
            planner.fused_loss,
            lambda: planner.computing(resolved),
            offloads=config.training.activation_offloading,
        ).recording


def made(events: list[Event]) -> list[tuple]:
    return [(event.group, event.nbytes, event.kind) for event in events if event.nbytes > 0]


def freed(events: list[Event]) -> Counter:
    """By group, and where it was made; what is freed at once has no order that would mean anything."""
    homes = {event.storage: (event.group, event.nbytes) for event in events if event.nbytes > 0}
    return Counter((event.group, homes[event.storage]) for event in events if event.nbytes < 0)


def highest(events: list[Event]) -> int:
    return max(accumulate(event.nbytes for event in events))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["method=qlora", "lora_variant=dora"], marks=pytest.mark.thorough),
        ["method=lora"],
        ["method=qlora", "training=long_rows"],
        pytest.param(["method=full", "training.gradient_checkpointing=false"], marks=pytest.mark.thorough),
        pytest.param(["method=oft", "training.gradient_checkpointing=false"], marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_deepened_recording_equals_that_of_the_deeper_model(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiling, "LEAST", 32)
    found = deepen(recorded(LAYERS, *words), stand_ins(LAYERS + 2))
    expected = recorded(LAYERS + 2, *words).events
    assert made(found) == made(expected)
    assert freed(found) == freed(expected)
    assert highest(found) == highest(expected)


@pytest.mark.slow
def test_recording_of_some_recomputed_layers_equals_that_of_the_deeper_model():
    depth, recomputed = 2 * LAYERS + 3, LAYERS + 2
    found = deepen(recorded(2 * LAYERS, recomputed=LAYERS), stand_ins(depth, recomputed))
    expected = recorded(depth, recomputed=recomputed).events
    assert made(found) == made(expected)
    assert freed(found) == freed(expected)
    assert highest(found) == highest(expected)


@given(st.integers(1, 90), st.data())
def test_every_layer_of_a_deep_model_has_a_stand_in(depth: int, data):
    recomputed = data.draw(st.none() | st.integers(1, depth))
    counts = stand_ins(depth, recomputed)
    assert sum(counts) == depth
    assert recomputed is None or any(sum(counts[:n]) == recomputed for n in range(len(counts) + 1))
    assert len(counts) <= 2 * LAYERS or {*counts} == {1}


def test_irregular_layers_are_rejected():
    events = [Event(("forward", layer), layer, 100 + (layer == 2), "activations") for layer in range(LAYERS)]
    with pytest.raises(IrregularError, match="forward"):
        deepen(Recording(events), stand_ins(9))


def test_allocations_and_frees_are_recorded_once():
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        kept = torch.empty(10, 10)
        view = kept.t()
        gone = torch.empty(3)
        del gone
    assert [event.nbytes for event in recorder.recording.events] == [400, 12, -12]
    assert view is not None


def test_arithmetic_is_counted():
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        torch.empty(3, 4) @ torch.empty(4, 5)
    works = recorder.recording.work["start", 0]
    assert sum(work.flops for work in works) == 2 * 3 * 4 * 5
    assert sum(work.nbytes for work in works) == 4 * (3 * 4 + 4 * 5 + 3 * 5)


def test_views_have_no_memory_traffic():
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        tensor = torch.empty(8, 8)
        assert tensor.device.type == "cpu"
        torch.empty_like(tensor).t().reshape(64)[None].detach()
    assert (
        sum(work.nbytes for works in recorder.recording.work.values() for work in works) == 2 * 8 * 8 * 4
    )  # reshape's


def test_materialized_weights_stay_tied():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    materialize(model, FakeTensorMode())
    assert model[0].weight is model[1].weight
    assert model[0].weight.device.type == "cpu"


def test_frees_after_the_recording_are_not_recorded():
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        stays, goes = torch.empty(8), torch.empty(4)
        del goes
    del stays
    assert [event.nbytes for event in recorder.recording.events] == [32, 16, -16]


def test_storage_at_the_address_of_a_replaced_weight_is_recorded():
    recorder = Recorder()
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.empty(8)) for _ in range(50)]
        recorder.ignore(weights)
        with recorder:
            for weight in weights:  # as bitsandbytes does with biases in another dtype
                weight.data = weight.data.to(torch.bfloat16)
            kept = [torch.empty(3) for _ in range(50)]
    assert [event.nbytes for event in recorder.recording.events] == [16] * 50 + [12] * 50
    assert len(kept) == 50
