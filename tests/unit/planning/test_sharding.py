"""What each of several processes holds and sends agrees with torch's DDP and FSDP2, and with closed forms."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.planning import ARCHITECTURE, CPU, GPU, VOCABULARY, predict
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.environment.device import resolve
from qlora_exp.models import base
from qlora_exp.models.trained import layers_of
from qlora_exp.planning import planner, sharding
from qlora_exp.planning.recording.fake_tensors import Event
from qlora_exp.planning.step import Step
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.units import MIB


@given(shape=st.lists(st.integers(1, 300), min_size=1, max_size=3), ranks=st.integers(1, 64))
def test_shares_hold_the_whole_and_at_most_a_row_more_each(shape: list[int], ranks: int):
    whole, row = math.prod(shape), math.prod(shape[1:])
    sizes = [math.prod(sharding.share(shape, number)) for number in (1, ranks, ranks + 1)]
    assert sizes[0] == whole
    assert whole <= ranks * sizes[1] < whole + ranks * row
    assert sizes[2] <= sizes[1]


def test_buckets_are_those_of_ddp():
    sizes = [3 * MIB, 10, 20 * MIB, 4 * MIB, 7 * MIB, 30 * MIB, MIB // 8, 5]
    model = torch.nn.ParameterList(
        torch.nn.Parameter(torch.empty(size // 4, dtype=dtype, device="meta"))
        for size in sizes
        for dtype in (torch.float32, torch.bfloat16)
    )
    tensors = [*reversed([*model.parameters()])]
    assigned, _ = torch._C._distributed_c10d._compute_bucket_assignment_by_size(tensors, [MIB, 25 * MIB])
    expected = [sum(tensors[number].nbytes for number in bucket) for bucket in assigned]
    assert sorted(sharding.buckets(model)) == sorted(expected)


def units(ranks: int, **changes: bool) -> sharding.Units:
    layers = [sharding.Unit((40, 40), (8,)), sharding.Unit((40, 40), (8,))]
    return sharding.Units(ranks, layers, sharding.Unit((4,), (16, 16)), **changes)


STEP = [
    Event(("start", 0), 0, 1, "activations"),
    Event(("forward", 0), 1, 1, "activations"),
    Event(("forward", 1), 2, 1, "activations"),
    Event(("loss", 0), 3, 1, "loss"),
    Event(("loss", 1), 4, 16, "gradients"),
    Event(("backward", 1), 5, 8, "gradients"),
    Event(("backward", 0), 6, 8, "gradients"),
    Event(("backward", 0), 7, 16, "gradients"),  # of the embeddings
    Event(("end", 0), 3, -1),
]


def test_units_are_gathered_in_forward_and_backward_passes_and_gradients_reduced():
    sharded, traffic = sharding.shard(Step(STEP), units(4), accumulated=3)
    kinds: dict[str, list[int]] = {}
    alive: dict[int, int] = {}
    most = 0
    for event in sharded.passes:
        if event.nbytes > 0:
            kinds.setdefault(event.kind, []).append(event.nbytes)
            if event.kind in ("gathered", "communication"):
                alive[event.storage] = event.nbytes
        else:
            assert alive.pop(event.storage, 1) == -event.nbytes
        most = max(most, sum(alive.values()))
    assert kinds["gradients"] == [8 // 4, 8 // 4, 32 // 4]  # shares
    assert traffic.gathered == 3 * 2 * (2 * 88 + 36) * 3 // 4
    assert traffic.reduced == 3 * (16 + 8 + 8 + 16) * 3 // 4
    assert most == 36 + 3 * 88  # the rest, a layer, the buffer that it came from and that of the last one
    assert set(alive) <= {event.storage for event in sharded.passes if event.kind == "communication"}
    again, _ = sharding.shard(Step(STEP), units(4, offloaded=True), accumulated=3)
    assert "gradients" not in {event.kind for event in again.passes}


@pytest.fixture(scope="module")
def plan() -> planner.Planner:
    words = ["training.max_length=64", "training.per_device_train_batch_size=1", "method=qlora"]
    return planner.planner(compose(["model=tiny_llama", ARCHITECTURE, *words]), GPU)


def shared(plan: planner.Planner, engine: str, ranks: int, **changes: bool) -> planner.Prediction:
    return plan.over(DistributedConfig(engine=engine, num_processes=ranks, **changes)).predict(evaluated=8)


@pytest.mark.slow
def test_one_process_is_planned_as_without_the_others(plan: planner.Planner):
    alone = plan.predict(evaluated=8)
    for engine in ("ddp", "fsdp"):
        one = shared(plan, engine, 1)
        assert (one.phases["load"], one.traffic.total) == (alone.phases["load"], 0)
        assert one.phases["first_step"].kinds.keys() == alone.phases["first_step"].kinds.keys()
    with pytest.raises(ConfigError, match=r"distributed\.num_processes"):
        predict("method=lora", "distributed=ddp")


@pytest.mark.slow
def test_each_process_of_ddp_has_the_whole_model_and_buckets(plan: planner.Planner):
    alone, each = plan.predict(evaluated=8), shared(plan, "ddp", 4)
    for name in alone.phases.keys() - {"load"}:
        more = {"communication": 4 * alone.trainable}
        assert each.phases[name].kinds == alone.phases[name].kinds | more
    assert each.phases["load"] == alone.phases["load"]
    assert each.traffic == sharding.Traffic(reduced=2 * 3 * 4 * alone.trainable // 4)


@pytest.mark.slow
def test_each_process_of_fsdp_has_its_share(plan: planner.Planner):
    alone, numbers = plan.predict(evaluated=8), (2, 4, 8)
    each = [shared(plan, "fsdp", ranks) for ranks in numbers]
    assert [found.trainable for found in each] == [alone.trainable] * 3
    loads = [found.phases["load"] for found in (alone, *each)]
    assert all(more.tensors > less.tensors for more, less in pairwise(loads))
    assert {load.kinds["quantization"] for load in loads} == {loads[0].kinds["quantization"]}  # not shared out
    for ranks, load in zip(numbers, loads[1:], strict=True):
        for kind in ("weights", "trainable"):
            assert ranks * load.kinds[kind] >= loads[0].kinds[kind]
    assert all(less.traffic.total < more.traffic.total for less, more in pairwise(each))
    assert {found.paged for found in each} == {0}  # the optimizer runs as one of torch
    away = shared(plan, "fsdp", 4, cpu_offload=True)
    assert set(away.phases["load"].kinds) == {"weights", "quantization", "temporary"}
    assert away.phases["load"].kinds["weights"] < 1024  # buffers
    stored = loads[2].kinds["weights"] - away.phases["load"].kinds["weights"]
    assert away.offloaded >= stored + 4 * loads[2].kinds["trainable"]  # with gradients and two states


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_prediction_matches_what_fully_shard_takes(method: str, tmp_path: Path):
    layers, ranks, inner = 6, 3, 2048
    words = ["model=tiny_llama", ARCHITECTURE, f"++model.architecture.num_hidden_layers={layers}", f"method={method}"]
    words += ["training.max_length=16", "device=cpu", f"++model.architecture.intermediate_size={inner}"]
    words += ["training.per_device_train_batch_size=1", "training.gradient_checkpointing=true"]
    words += ["optimizer.optim=sgd"]  # without states the passes are the fullest moment
    config = compose([*words, "distributed=fsdp", f"distributed.num_processes={ranks}"])
    resolved = resolve(config, CPU)
    found = planner.Planner(config, resolved).predict(evaluated=0).phases
    model = planner.build_model(config, resolved, base.model_config(config.model), layers)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    before, after = 12_345_678, 12_345_679  # bytes of marks in the trace
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        for unit in (*layers_of(model), model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        held = sum(parameter.to_local().untyped_storage().nbytes() for parameter in model.parameters())
        with torch.profiler.profile(profile_memory=True) as profiler:
            torch.empty(before, dtype=torch.uint8)
            with planner.as_it_runs(on_cuda=False):
                planner.fused_loss(model, torch.arange(16).view(1, 16) % VOCABULARY, None).backward()
            torch.empty(after, dtype=torch.uint8)
    finally:
        torch.distributed.destroy_process_group()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found["load"].tensors == held + buffers
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    taken: dict[int, int] = {}  # bytes by address; what other tests left may be freed meanwhile
    most = 0
    for event in json.loads((tmp_path / "trace.json").read_text("utf-8"))["traceEvents"]:
        if event.get("name") == "[memory]":
            size, address = event["args"]["Bytes"], event["args"]["Addr"]
            if size == after:
                break
            if size < 0:
                taken.pop(address, None)
            elif size != before:
                taken[address] = size
                most = max(most, sum(taken.values()))
    assert found["first_step"].tensors - held - buffers == pytest.approx(most, rel=0.02)
