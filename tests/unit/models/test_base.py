import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import base
from qlora_exp.utils.errors import ModelError

CPU = Device("cpu", "CPU", bf16=False, paging=False)


def load(*overrides: str):
    config = compose(["model=tiny_llama", *overrides])
    resolved = resolve(config, Device("cpu", "CPU", bf16=False, paging=False))
    model = base.load_model(config.model, config.quantization, resolved)
    return config, resolved, model


def test_skeleton_has_no_weights():
    parameters = list(base.skeleton(ModelConfig(model_name_or_path="random:llama")).parameters())
    assert {str(parameter.device) for parameter in parameters} == {"meta"}


def test_model_has_the_resolved_dtype():
    _, _, model = load("method=lora", "model.dtype=bfloat16", "model.attn_implementation=eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("engine", "place"),
    [("none", "auto"), ("ddp", {"": "cpu"}), ("fsdp", {"": "cpu"}), ("deepspeed_zero3", {"": "cpu"})],
)
def test_model_is_spread_over_devices_only_if_no_processes_share_the_run(engine, place, monkeypatch):
    config, asked = compose(["model=tiny_llama", "method=lora", "model.device_map=auto"]), {}

    def from_pretrained(*_, **arguments):
        asked.update(arguments)
        raise ModelError("seen")

    monkeypatch.setattr(base.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="seen"):
        base.load_model(
            config.model,
            config.quantization,
            resolve(config, Device("cpu", "CPU", bf16=False, paging=False)),
            DistributedConfig(engine=engine),
        )
    assert asked["device_map"] == place


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of mapped files")
def test_model_to_be_sharded_stays_in_its_file():
    """Processes of one machine then share the memory of its weights."""
    config = compose(["model=tiny_llama", "method=lora"])
    model = base.load_model(
        config.model,
        config.quantization,
        resolve(config, Device("cpu", "CPU", bf16=False, paging=False)),
        DistributedConfig(engine="fsdp"),
    )
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        start, end = (int(address, 16) for address in words[0].split("-"))
        files += [words[-1] for weight in model.parameters() if start <= weight.data_ptr() < end]
    assert {Path(file).name for file in files} == {"model.safetensors"}
    assert len(files) == len([*model.parameters()])


def test_model_to_be_sharded_is_quantized_as_any_other():
    config, resolved, model = load("method=qlora")
    to_shard = base.load_model(config.model, config.quantization, resolved, DistributedConfig(engine="fsdp"))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(to_shard.state_dict()[name], weight, rtol=0, atol=0)
    layer, sharded = (m.model.layers[0].mlp.up_proj.weight.quant_state for m in (model, to_shard))
    torch.testing.assert_close(sharded.as_dict(packed=True), layer.as_dict(packed=True), rtol=0, atol=0)


def test_tokenizer_pads_with_another_token_than_eos(tiny_tokenizer):
    assert tiny_tokenizer.pad_token_id != tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no-such-folder", "no folder"),
        ("someone/no-such-model", "cannot be fetched from the hub"),
        ("two/slashes/here", "no such model|cannot be fetched"),
    ],
)
def test_missing_model_is_reported(name: str, message: str):
    with pytest.raises(ModelError, match=message):
        base.load_tokenizer(ModelConfig(model_name_or_path=name))


def test_damaged_local_model_is_reported(tmp_path):
    import shutil

    from qlora_exp.models.builtin import folder_of

    folder = shutil.copytree(folder_of("random:llama"), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00garbage")
    config = compose(["method=lora", f"model.model_name_or_path={folder}"])
    with pytest.raises(ModelError, match="damaged"):
        base.load_model(
            config.model, config.quantization, resolve(config, Device("cpu", "CPU", bf16=False, paging=False))
        )


def test_local_folder_is_loaded_as_a_model(tmp_path):
    from qlora_exp.models.builtin import folder_of

    config = ModelConfig(model_name_or_path=str(folder_of("random:opt")))
    assert base.skeleton(config).config.model_type == "opt"


def gated(*_: object, **__: object) -> None:
    raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")


def test_gated_model_asks_for_a_token(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", gated)
    with pytest.raises(
        ModelError,
        match=r"gated: accept its licence at https://huggingface.co/meta-llama/x, then set HF_TOKEN",
    ):
        base.load_tokenizer(ModelConfig(model_name_or_path="meta-llama/x"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_quantized_model_releases_its_mapped_file():
    _, _, model = load("method=qlora")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    mapped = [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]
    assert not [name for name, tensor in model.named_parameters() if any(tensor.data_ptr() in one for one in mapped)]


@pytest.mark.parametrize(
    ("kind", "fields", "positions"),
    [
        ("gpt2", {}, 2048),
        ("gptj", {"rotary_dim": 8}, 2048),
        ("gpt_bigcode", {}, 2048),
        ("opt", {}, 2048),
        ("llama", {}, None),
        ("gpt_neox", {}, None),
        ("bloom", {}, None),
    ],
)
def test_only_tables_limit_positions(kind: str, fields: dict[str, int], positions: int | None, tiny_model):
    found = base.skeleton(ModelConfig(model_name_or_path=tiny_model(kind, **fields)))
    assert base.learned_positions(found) == positions


def test_base_that_would_stay_unquantized_is_refused(tiny_model):
    config = compose(["method=qlora"])
    resolved = resolve(config, Device("cpu", "CPU", bf16=False, paging=False))

    def check(model: ModelConfig) -> str | None:
        return base.check_quantization(model, config.quantization, resolved, base.skeleton(model))

    falcon = tiny_model("falcon", new_decoder_architecture=False, multi_query=True, alibi=False)
    with pytest.raises(ModelError, match="does not quantize layers of class FalconLinear"):
        check(ModelConfig(model_name_or_path=falcon))
    for kind in ("gpt2", "bloom", "llama"):
        assert check(ModelConfig(model_name_or_path=tiny_model(kind))) is None


def test_base_that_lacks_a_tensor_is_rejected_by_its_name(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    lost = "model.layers.0.mlp.down_proj.weight"
    save_file({name: one for name, one in weights.items() if name != lost}, folder / "model.safetensors")
    config = compose(["model=hub", f"model.model_name_or_path={folder}", "device=cpu"])
    for load in (
        lambda: base.load_unquantized(config.model),
        lambda: base.load_model(
            config.model, config.quantization, resolve(config, Device("cpu", "CPU", bf16=False, paging=False))
        ),
    ):
        with pytest.raises(ModelError, match=f"lack 1 tensors that its config describes: {lost};"):
            load()


def test_settings_of_a_model_change_no_answer_inside_own_settings_alone(tiny_model):
    config = compose(["model=hub", f"model.model_name_or_path={tiny_model('llama')}", "device=cpu"])
    model = base.load_unquantized(config.model)
    ids, settings = torch.arange(40, 60)[None], GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)

    def answer():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings).tolist()

    plain = answer()
    own = GenerationConfig(repetition_penalty=3.0, no_repeat_ngram_size=2, num_beams=2, suppress_tokens=plain[0][-3:])
    model.generation_config = own
    assert answer() != plain
    for each in (model, get_peft_model(model, LoraConfig(target_modules=["q_proj"]))):
        with base.own_settings_alone(each):
            found = each.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert found.tolist() == plain
        assert model.generation_config is own
