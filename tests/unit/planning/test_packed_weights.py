import pytest
import torch
from helpers.planning import ARCHITECTURE, CPU, GPU, HIDDEN, INNER, LAYERS, LINEAR, REST, predict

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import resolve
from qlora_exp.models import base
from qlora_exp.planning import planner

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "constants"), [("nf4", LINEAR / 16), ("nf4_double", LINEAR / 64 * (1 + 4 / 256))])
def test_four_bit_base_takes_half_a_byte_per_weight_and_its_constants(name: str, constants: float):
    kinds = predict("method=qlora", f"quantization={name}").phases["load"].kinds
    assert kinds["weights"] == pytest.approx(LINEAR / 2 + 2 * REST, rel=1e-3)
    assert kinds["quantization"] == pytest.approx(constants, rel=0.03)


def test_int8_base_takes_a_byte_per_weight_and_a_scale_per_row():
    kinds = predict("method=qlora", "quantization=int8").phases["load"].kinds
    assert kinds["weights"] == pytest.approx(LINEAR + 2 * REST, rel=1e-3)
    assert kinds["quantization"] == 4 * LAYERS * (5 * HIDDEN + 2 * INNER)


def test_weights_are_dequantized_to_the_compute_dtype():
    config = compose(["model=tiny_llama", ARCHITECTURE, "method=qlora"])
    for device, dtype in ((GPU, torch.bfloat16), (CPU, torch.float32)):
        resolved = resolve(config, device)
        model = planner.build_model(config, resolved, base.model_config(config.model), 1)
        layer = next(module for module in model.modules() if type(module).__name__ == "Linear4bit")
        assert layer.weight.filled(torch.empty).quant_state.dtype == dtype
