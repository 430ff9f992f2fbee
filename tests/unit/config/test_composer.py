import json

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from qlora_exp.config.composer import Composer
from qlora_exp.config.hydra_compose import conf_dir, register


@pytest.mark.parametrize(
    "words",
    [
        ["method.r=4", "method=lora", "seed=1"],
        ["quantization=fp4", "lora_variant=dora", "method.lora_alpha=8"],
        ["experiment=opt125m_dolly_lora", "training.max_steps=5", "+tracking.tags.a=b"],
        ["method.target_modules=[q_proj,v_proj]", "~tracking.tags", "training.learning_rate=1e-3"],
        ["experiment=smollm2_faq_lora", "hydra.verbose=true", "model=tiny_opt"],
        ["training.max_steps=1.0", "training.bf16=true", "tracking.experiment_name='a: $b'", "method.lora_alpha='8'"],
        ["training.learning_rate=null", "tracking.experiment_name=run-${seed}", "seed=7"],
        ["model=hub", "model.model_name_or_path=a/b", "+model.random_config={hidden_size:8}", "model.dtype=null"],
    ],
)
def test_composed_job_equals_hydras(words: list[str]):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        expected = loader.load_sweep_config(master, words)
        compose = Composer(loader, lambda words: loader.load_sweep_config(master, words))
        for shared in (len(words) - 1, 1, 0, 0):  # the last time from what the one before kept
            composed, choices = compose(words[:shared], words[shared:])
            rest = OmegaConf.masked_copy(expected, [key for key in expected if key != "hydra"])
            plain = OmegaConf.to_container(rest, resolve=True)
            assert json.dumps(composed) == json.dumps(plain)  # 1 is not 1.0
            assert choices == expected.hydra.runtime.choices
    with pytest.raises(Exception, match="max_step"), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose([], ["training.max_step=1"])
