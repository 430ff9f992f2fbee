import inspect

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from qlora_exp.libraries import peft as private
from qlora_exp.libraries.torch import AssumedValues
from qlora_exp.models.builtin import TINY


def test_a_type_is_added_to_the_enumeration():
    before = [*PeftType]
    private.add_peft_type("TRY")
    try:
        assert [*PeftType] == [*before, PeftType.TRY]
        assert PeftType("TRY") is PeftType["TRY"] is PeftType.TRY
        assert PeftType.TRY == PeftType.TRY.value == PeftType.TRY.name == "TRY"
    finally:
        type.__delattr__(PeftType, "TRY")
        del PeftType._member_map_["TRY"], PeftType._value2member_map_["TRY"]
        PeftType._member_names_.remove("TRY")
    assert [*PeftType] == before


def test_the_enumeration_is_still_closed():
    """Else `add_peft_type` is not needed any more."""
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("NEW")


@pytest.mark.parametrize(("variant", "adds"), [({}, False), ({"kasa": True}, True)])
def test_kasa_adds_to_the_loss(variant: dict, adds: bool):
    from peft import KasaConfig

    settings = {"kasa_config": KasaConfig()} if variant else {}
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2, **settings)
    )
    assert (float(private.loss_of_adapter(model.base_model)) > 0) == adds


def test_an_adaption_prompt_calls_the_forward_of_its_attachment_unless_it_follows():
    shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    base = AutoModelForCausalLM.from_config(shape)
    adapted = get_peft_model(base, AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"))
    base.forward = lambda *_, **__: "replaced"
    assert adapted(input_ids=torch.ones(1, 4, dtype=torch.long)) != "replaced"  # else it is not needed any more
    private.follow_forward_of_base(adapted)
    assert adapted(input_ids=torch.ones(1, 4, dtype=torch.long)) == "replaced"


def test_tuners_have_the_hooks_that_bottleneck_adapters_use():
    """What they do: tests/unit/models/test_bottleneck.py."""
    names = [
        "self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name",
    ]  # fmt: skip
    assert [*inspect.signature(BaseTuner._create_and_replace).parameters] == names
    assert [*inspect.signature(BaseTuner._replace_module).parameters] == [
        "self",
        "parent",
        "child_name",
        "new_module",
        "child",
    ]
    moved = inspect.signature(BaseTunerLayer._move_adapter_to_device_of_base_layer).parameters
    assert [*moved][:2] == ["self", "adapter_name"]
    assert "self._active_adapter" in inspect.getsource(BaseTunerLayer)


@pytest.mark.parametrize(("variant", "trained"), [("kasa_config", {}), ("monteclora_config", {"num_samples": 3})])
def test_variants_of_lora_defer_what_needs_values_and_plans_need_none(variant: str, trained: dict):
    from peft import KasaConfig, MontecloraConfig

    settings = {variant: KasaConfig() if variant == "kasa_config" else MontecloraConfig(**trained)}
    with torch.device("meta"):
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"], **settings))
    with private.without_values(lambda weight, **_: weight), AssumedValues():
        private.create_samplers(model)
        model(torch.empty(2, 8, device="meta"))  # would truncate the base's weight, or create a sampler
    samplers = [name for name, _ in model.named_parameters() if "sampler" in name]
    assert len(samplers) == 2 * bool(trained)


def test_output_layer_with_trained_rows_has_the_attribute_that_is_added():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY["llama"], vocab_size=64))
    rows = {"model.embed_tokens": [3], "lm_head": [3]}
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    head = tuned.get_base_model().get_output_embeddings()
    assert isinstance(head, TrainableTokensWrapper)
    with pytest.raises(AttributeError, match="bias"):
        _ = head.bias
    private.complete_heads(tuned)
    assert head.bias is None
    assert head.weight.requires_grad
