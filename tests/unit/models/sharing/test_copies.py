import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import detect, resolve
from qlora_exp.models.base import load_model
from qlora_exp.models.sharing.copies import SharedBase
from qlora_exp.utils.errors import ConfigError


def load(quantization: str):
    method = "lora" if quantization == "none" else "qlora"
    config = compose(["model=tiny_llama", f"method={method}", f"quantization={quantization}"])
    return load_model(config.model, config.quantization, resolve(config, detect("cpu")))


@pytest.mark.parametrize("quantization", ["none", "nf4_double", "int8"])
def test_copies_share_every_weight_and_compute_the_same_apart_from_their_adapters(quantization: str):
    ids = torch.arange(5, 25)[None]
    before = load(quantization)(ids).logits
    model = load(quantization)
    base = SharedBase(model)
    one, two = base.copy(), base.copy()
    assert one.config is not model.config
    assert {*map(id, one.modules())}.isdisjoint({*map(id, two.modules())})
    own = {parameter.data_ptr() for parameter in model.parameters()}
    adapted = get_peft_model(one, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert {p.data_ptr() for name, p in adapted.named_parameters() if "lora_" not in name} == own
    assert {p.data_ptr() for p in two.parameters()} == own
    assert not torch.allclose(adapted(ids).logits, before)
    assert torch.equal(two(ids).logits, before)
    base.check()


def test_a_job_that_changes_or_trains_a_shared_weight_is_refused():
    base = SharedBase(load("none"))
    weight = base.copy().get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="sweep.fuse=off"):
        base.check()
    weight.requires_grad_(False)
    base.check()
    weight.mul_(1.0)
    with pytest.raises(ConfigError, match="changes weights"):
        base.check()
