import inspect

import gguf
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers.gguf_models import write_tiny_gguf
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    masking_utils,
)
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_exp.libraries.transformers import (
    attention_of,
    experts_without_values,
    gguf_files_read_once,
    load_best_checkpoint,
    model_types,
    parameters_packed,
    quantized_on,
    rows_without_values,
    saved_by_any_process,
    with_bitsandbytes_layers,
)
from qlora_exp.models.builtin import TINY


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_of_a_model_is_named(attention: str):
    shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention)
    assert attention_of(model) == attention


def test_linear_layers_become_bitsandbytes_and_the_head_stays():
    shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
        with_bitsandbytes_layers(model, BitsAndBytesConfig(load_in_4bit=True))
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
    assert type(model.lm_head) is torch.nn.Linear


def test_a_row_without_values_has_no_mask_of_its_square():
    shape = LlamaConfig(num_attention_heads=2, attn_implementation="sdpa")
    with FakeTensorMode():
        inputs, places = torch.ones(1, 8, 4), torch.arange(8)[None]
        settings = {"attention_mask": None, "past_key_values": None, "position_ids": places}
        assert masking_utils.create_causal_mask(shape, inputs, **settings).shape == (1, 1, 8, 8)
        with rows_without_values():
            assert masking_utils.create_causal_mask(shape, inputs, **settings) is None
            padded = settings | {"attention_mask": torch.ones(1, 8, dtype=torch.long)}
            assert masking_utils.create_causal_mask(shape, inputs, **padded) is not None


def test_weights_are_quantized_on_another_device_than_they_are_loaded_on(monkeypatch):
    places = []

    def convert(self, input_dict, **_):
        places.append({str(value.device) for value in input_dict.values()})
        return {name: torch.ones(2) for name in input_dict}

    monkeypatch.setattr(Bnb4bitQuantize, "convert", convert)
    with quantized_on("meta"):
        loaded = Bnb4bitQuantize(None).convert({"weight": [torch.ones(2)]}, full_layer_name="weight")
    assert places == [{"meta"}]
    assert loaded["weight"].device.type == "cpu"
    assert Bnb4bitQuantize.convert is convert


def test_other_parameters_are_packed_as_they_are_read(monkeypatch):
    monkeypatch.setattr(Bnb4bitQuantize, "convert", lambda self, input_dict, **_: dict.fromkeys(input_dict, "layer"))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    needs = Bnb4BitHfQuantizer.param_needs_quantization
    with parameters_packed(lambda _: {"0.bias"}, lambda tensor: tensor * 2):
        assert quantizer.param_needs_quantization(model, "0.bias")
        assert not quantizer.param_needs_quantization(model, "0.weight")
        convert = Bnb4bitQuantize(quantizer).convert
        assert torch.equal(convert({"0.bias": [torch.ones(2)]}, model=model)["0.bias"], torch.full((2,), 2.0))
        assert convert({"0.weight": [torch.ones(2)]}, model=model) == {"0.weight": "layer"}
        quantizer.pre_quantized = True
        assert not quantizer.param_needs_quantization(model, "0.bias")
    assert Bnb4BitHfQuantizer.param_needs_quantization is needs


def test_every_type_of_model_that_generates_text_is_known():
    known = model_types()
    assert {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} <= known
    assert {"llama", "gemma3_text", "gpt-sw3"} <= known
    assert "lama" not in known


def test_the_best_checkpoint_is_that_of_the_state(tmp_path):
    """What a whole run does with it: the compatibility probe, aspect load_best_model_at_end."""
    shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(tmp_path / "checkpoint-1")
    before = model.lm_head.weight.detach().clone()
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    torch.nn.init.zeros_(model.lm_head.weight)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    load_best_checkpoint(trainer)
    assert torch.equal(trainer.model.lm_head.weight, before)


def test_a_gguf_file_is_read_once(tmp_path, monkeypatch):
    folder = tmp_path / "written"
    folder.mkdir()
    written, _ = write_tiny_gguf(folder, "llama")
    reads = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path):
            reads.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    with gguf_files_read_once():
        AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        settings = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", quantization_config=settings, dtype="float32"
        )
    assert len(reads) == 1
    assert gguf.GGUFReader is Counting
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in written.state_dict().items())


def test_each_process_saves_where_it_is_wanted(tmp_path, monkeypatch):
    """Where it is used: tests/unit/models/test_builtin.py."""
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(tmp_path / "by default")
    with saved_by_any_process():
        model.save_pretrained(tmp_path / "here")
    assert [(tmp_path / name / "model.safetensors").exists() for name in ("by default", "here")] == [False, True]


def test_transformers_calls_what_our_trainer_overrides():
    """What the overrides do: tests/unit/training/test_trainer.py."""
    source = inspect.getsource(Trainer)
    assert "sampler_fn=self._get_train_sampler," in source
    assert "sampler_fn=self._get_eval_sampler," in source
    assert "self._run_epoch(" in source
    assert "self._prepare_inputs(inputs)" in source
    assert "self._save_checkpoint(model, trial)" in source
    assert "self._save(" in source
    assert "self._load_best_model()" in source
    assert "self._save_optimizer_and_scheduler(output_dir)" in source
    assert "self._defer_fsdp_gradient_reduction" in source
    assert "if self.is_distributed_loading_by_transformers:" in source
    clipped, stepped = source.index("self._get_grad_norm(model, grad_norm=grad_norm)"), source.index("optimizer.step()")
    assert source.index("self._clip_grad_norm(model)") < clipped < stepped
    assert "model = self._wrap_model(self.model_wrapped)" in source
    assert isinstance(TrainingArguments.n_gpu, property)
    assert "self.n_gpu" in inspect.getsource(TrainingArguments.train_batch_size.fget)


def test_experts_compute_without_values_in_any_dtype():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **TINY["qwen3_moe"], vocab_size=64))
        ids = torch.zeros(2, 5, dtype=torch.long)
        with pytest.raises(RuntimeError, match="BF16"):  # else the function is not needed any more
            model(input_ids=ids)
        with experts_without_values(lambda tokens, experts: tokens @ experts[0]):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.grad.shape == experts.gate_up_proj.shape
