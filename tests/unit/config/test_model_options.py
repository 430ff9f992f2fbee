"""The architectures in conf/model are those of the models that they name."""

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.planning import advisor

PARAMETERS = {
    "codellama_34b": 33_743_970_304,
    "deepseek_r1_distill_llama_8b": 8_030_261_248,
    "deepseek_r1_distill_qwen_1_5b": 1_777_088_000,
    "deepseek_r1_distill_qwen_7b": 7_615_616_512,
    "gemma3_1b": 999_885_952,
    "gemma3_270m": 268_098_176,
    "gpt_oss_20b": 20_914_757_184,
    "llama2_13b": 13_015_864_320,
    "llama2_7b": 6_738_415_616,
    "llama31_70b_instruct": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama31_8b_instruct": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_8b_instruct": 8_030_261_248,
    "ministral_8b_instruct": 8_019_808_256,
    "mistral_7b": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "mistral_small_24b": 23_572_403_200,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "opt_125m": 125_239_296,
    "phi4": 14_659_507_200,
    "phi4_mini_instruct": 3_836_021_760,
    "qwen25_0_5b": 494_032_768,
    "qwen25_1_5b_instruct": 1_543_714_304,
    "qwen25_7b_instruct": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_14b": 14_768_307_200,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_32b": 32_762_123_264,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
}
"""Number of parameters by the models' cards on the hub."""
ARCHITECTURES = {
    file.stem: option
    for file in (conf_dir() / "model").glob("*.yaml")
    if (option := yaml.safe_load(file.read_text("utf-8"))).get("architecture")
}


def test_every_architecture_has_a_known_size():
    assert ARCHITECTURES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architecture_has_the_parameters_of_its_model(name: str):
    option = ARCHITECTURES[name]
    fields = dict(option["architecture"])
    assert fields.pop("_name_or_path") == option["model_name_or_path"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.tie_weights()
    assert model.num_parameters() == PARAMETERS[name]
    assert 0.05 * PARAMETERS[name] < advisor.least_parameters(option["architecture"]) <= PARAMETERS[name]
