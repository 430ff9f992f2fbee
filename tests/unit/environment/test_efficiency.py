"""Arithmetic is counted by hand here, energy is read from counters that tests make."""

from pathlib import Path

import pytest
import torch

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment import efficiency
from qlora_exp.environment.device import detect, resolve
from qlora_exp.environment.efficiency import EnergyMeter, FlopCounter, flops_of, of_training, peak_flops
from qlora_exp.models.base import load_model

IDS = torch.arange(40, 72)[None]


def test_matrix_product_and_its_gradients_count_three_times():
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    with FlopCounter() as forward:
        y = x @ w
    with FlopCounter() as backward:
        y.sum().backward()
    assert forward.flops == 2 * 5 * 7 * 3
    assert backward.flops == 2 * forward.flops


def test_attention_counts_two_products_and_their_gradients():
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    with FlopCounter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.flops == 2 * (2 * 2 * 3 * 8 * 8 * 4)
    with FlopCounter() as backward:
        out.sum().backward()
    assert backward.flops == pytest.approx(2.5 * counter.flops)  # the scores are computed anew


def test_mixed_dtype_product_is_counted():
    """As TRL's loss computes on a GPU; these forms of the operations are not to be had on a CPU."""
    a, b, into = torch.empty(5, 7), torch.empty(7, 3), torch.empty(5, 3)
    assert flops_of(torch.ops.aten.mm.dtype, (a, b, torch.float32), {}, into) == 2 * 5 * 7 * 3
    assert flops_of(torch.ops.aten.addmm.dtype, (into, a, b, torch.float32), {}, into) == 2 * 5 * 7 * 3
    many = [one.expand(4, *one.shape) for one in (a, b, into)]
    assert flops_of(torch.ops.aten.bmm.dtype, (*many[:2], torch.float32), {}, many[2]) == 4 * 2 * 5 * 7 * 3
    assert flops_of(torch.ops.aten.baddbmm.dtype, (many[2], *many[:2], torch.float32), {}, many[2]) == 840


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_grouped_attention_counts_each_query_head(kernel: str):
    q, k, v = (torch.empty(2, heads, 8, 4) for heads in (6, 3, 3))
    packet = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    assert flops_of(packet.default, (q, k, v), {}, q) == 2 * (2 * 2 * 6 * 8 * 8 * 4)
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")
    assert flops_of(backward.default, (q, q, k, v), {}, q) == 5 * (2 * 2 * 6 * 8 * 8 * 4)


def test_counting_does_not_change_results():
    model = base("none")
    plain = model(input_ids=IDS).logits
    with FlopCounter():
        assert torch.equal(model(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("quantization", ["nf4_double", "fp4", "int8"])
def test_quantized_base_does_the_same_arithmetic(quantization: str):
    counts = []
    for name in ("none", quantization):
        model = base(name)
        with FlopCounter() as counter:
            model(input_ids=IDS)
        counts.append(counter.flops)
    assert counts[0] == counts[1] > 0


def base(quantization: str):
    config = compose(["model=tiny_llama", "method=lora", f"quantization={quantization}"])
    return load_model(config.model, config.quantization, resolve(config, detect("cpu"))).train()


def test_peak_flops_of_the_device_are_measured():
    assert peak_flops("cpu", torch.float32) > 1e8


def test_peak_flops_of_a_slow_dtype_are_measured_quickly(monkeypatch):
    clock = iter(range(1000))  # seconds: each look at the clock is one later
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(clock))
    assert peak_flops("cpu", torch.float32) == 2 * 256**3  # one size, not all five


def counters(folder: Path, **joules: float) -> None:
    for name, value in joules.items():
        zone = folder / f"intel-rapl:{name[1:].replace('_', ':')}"
        zone.mkdir(exist_ok=True)
        (zone / "energy_uj").write_text(f"{round(value * 1e6)}\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")


@pytest.mark.parametrize(
    ("before", "after", "used"),
    [
        ({"z0": 10, "z1": 5}, {"z0": 13.5, "z1": 6}, 4.5),
        ({"z0": 262143}, {"z0": 1}, 1.32885),  # the counter started again
        ({"z0": 10, "z0_1": 3}, {"z0": 12, "z0_1": 9}, 2),  # a part of a package is in it already
    ],
)
def test_energy_is_summed_over_packages(before, after, used, tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "_gpu_joules", dict)
    counters(tmp_path, **before)
    with EnergyMeter(tmp_path) as meter:
        counters(tmp_path, **after)
    assert meter.joules == pytest.approx(used, abs=1e-4)


def test_energy_of_gpus_is_added(tmp_path, monkeypatch):
    told = iter([{"gpu0": (100.0, 0.0)}, {"gpu0": (130.0, 0.0)}])
    monkeypatch.setattr(efficiency, "_gpu_joules", lambda: next(told))
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules == 30


def test_machine_without_counters_reports_no_energy(tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "_gpu_joules", dict)
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules is None


def test_efficiency_relates_rates_to_peaks():
    metrics = {"tokens_per_second": 100.0, "flops_per_second": 3e9}
    peaks = {"steady": {"rss": 2000.0}, "load": {"rss": 9000.0}}
    found = of_training(metrics, peaks, 1e10, 7.0)
    assert found["mfu"] == pytest.approx(0.3)
    assert found["tokens_per_gb_second"] == pytest.approx(100 / 2.097152)
    assert found["energy_joules"] == 7
    assert of_training({}, {}, 1e10, None) == {"peak_flops_per_second": 1e10}
    on_gpu = of_training(metrics, {"steady": {"rss": 2000.0, "allocated": 1000.0}}, 1e10, None)
    assert on_gpu["tokens_per_gb_second"] == pytest.approx(100 / 1.048576)
