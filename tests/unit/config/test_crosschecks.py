"""Settings of different sections that contradict each other are rejected."""

import pytest

from qlora_exp.config.hydra_compose import compose, options
from qlora_exp.config.validate import from_dict
from qlora_exp.utils.errors import ConfigError


def test_random_config_without_a_random_model_is_rejected():
    with pytest.raises(ConfigError, match="random_config"):
        from_dict({"model": {"model_name_or_path": "a/b", "random_config": {"hidden_size": 8}}})


@pytest.mark.parametrize(
    "word",
    [
        "training.max_steps",
        "method.r",
        "method.rank_pattern={{q_proj: {}}}",
        "training.gradient_accumulation_steps",
        "dataset.max_train_rows",
        "training.sft_config.torch_empty_cache_steps",
    ],
)
def test_integers_that_no_library_can_hold_are_rejected(word):
    key, _, value = word.partition("=")
    place = f"{key}.q_proj" if value else key
    for number in (2**32, 10**30):
        with pytest.raises(ConfigError, match=rf"{place}={number} is too large"):
            compose(["method=lora", f"{key}={(value or '{}').format(number)}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ia3"], "needs a LoRA method, not method=ia3"),
        (["method=full"], "needs a LoRA method"),
        (["method=lora", "optimizer.lora_optimizer=lorafa", "optimizer.optim=sgd"], "its own AdamW"),
        (["method=lora", "optimizer.lora_optimizer=lorafa", "lora_variant=dora"], "trains LoRA's B only"),
        (["method=lora", "optimizer.loraplus_lr_ratio=0.5"], "greater than or equal to 1"),
    ],
)
def test_lora_optimizer_with_another_method_is_rejected(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose(["optimizer=loraplus", *words])


@pytest.mark.parametrize("words", [["lora_variant=kasa"], ["lora_variant=monteclora"], ["method.lora_bias=true"]])
def test_lora_fa_with_extra_matrices_is_rejected(words: list[str]):
    with pytest.raises(ConfigError, match="trains LoRA's B only"):
        compose(["method=lora", "optimizer=lorafa", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=prompt_tuning", "training.padding=free"], "does not work with rows in one sequence"),
        (["training.padding=free", "training.neftune_noise_alpha=5"], "NEFTune's noise depends on the longest row"),
        (["training.padding=by_length", "training.neftune_noise_alpha=5"], "NEFTune's noise"),
        (["method=lily", "training.padding=by_length"], "method=lily depends on which rows make a batch"),
    ],
)
def test_padding_that_would_change_what_is_learned_is_rejected(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora_variant=pissa", "quantization=nf4"], "init_lora_weights=pissa needs the base's own weights"),
        (["lora_variant=orthogonal", "quantization=int8"], "needs the base's own weights"),
        (["lora_variant=monteclora", "quantization=nf4"], "monteclora_config=.* needs the base's own weights"),
        (["lora_variant=loftq"], "makes up for a quantized base"),
        (["lora_variant=pissa", "method.use_dora=true"], "no place for use_dora=true"),
        (["lora_variant=olora", "method.bias=all"], "no place for trained biases"),
        (["lora_variant=corda", "method.modules_to_save=[lm_head]"], "no place for modules_to_save"),
        (
            ["lora_variant=pissa", "method.use_rslora=true", "+method.rank_pattern.q_proj=4"],
            "no place for use_rslora with",
        ),
        (["lora_variant=lora", "method.use_qalora=true"], "GPTQ"),
        (["lora_variant=pissa", "lora_variant.init_lora_weights=pisa"], "got 'pisa'"),
        (["lora_variant=corda", "lora_variant.corda_config.cache_file=x"], "not from files"),
        (["lora_variant=eva", "lora_variant.init_rows=0"], "greater than 0"),
        (["lora_variant=lora", "method.megatron_core=os"], "no such setting"),
    ],
)
def test_impossible_lora_initialization_is_rejected(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose(["method=lora", *words])


@pytest.mark.parametrize(
    "words", [["dataset.format=alpaca"], ["dataset.format=chat", "training.completion_only_loss=false"]]
)
def test_assistant_only_loss_without_a_dialogue_is_rejected(words: list[str]):
    with pytest.raises(ConfigError, match="assistant_only_loss needs"):
        compose([*words, "training.assistant_only_loss=true"])


def test_loftq_on_gptq_files_is_rejected():
    with pytest.raises(ConfigError, match="have lost"):
        compose(["method=lora", "lora_variant=loftq", "quantization=gptq"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=full", "quantization=nf4"], "cannot train a base stored as nf4"),
        (["method=qlora", "quantization=none"], "needs a quantized base"),
        (["method=full", "lora_variant=dora"], "needs a LoRA method"),
        (["method.use_dora=true", "lora_variant=dora"], "set in both"),
        (["device=mps"], "does not run on mps"),
    ],
)
def test_sections_that_contradict_each_other_are_rejected(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)


def test_pruning_without_evaluation_during_training_is_rejected():
    with pytest.raises(ConfigError, match="training.eval_strategy=steps"):
        compose(["search.prune=true", "training.eval_strategy=no"])
    with pytest.raises(ConfigError, match="training.eval_steps < max_steps"):
        compose(["search.prune=true", "training.eval_strategy=steps", "training.eval_steps=4", "training.max_steps=4"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=lora", "quantization=int8"], "cannot shard a base stored as int8: choose quantization=nf4_double"),
        (["method=lora", "quantization=torchao_int8"], "cannot shard a base stored as torchao_int8"),
        (["method=adalora"], r"cannot train method=adalora \(it computes with all matrices"),
        (["method=prompt_tuning"], r"cannot train method=prompt_tuning \(its prompt is read outside"),
        (["method=cartridge"], r"cannot train method=cartridge \(its prompt is read outside"),
        (["method=vblora"], r"cannot train method=vblora \(it shares parameters"),
        (["method=osf"], "cannot train method=osf"),
        (["method=lora", "lora_variant=monteclora"], "cannot train with monteclora_config, whose own loss"),
        (["method=lora", "lora_variant=pissa"], "cannot save init_lora_weights=pissa"),
        (["method=lora", "optimizer=adamw_bnb_8bit"], "the states of optimizer.optim=adamw_bnb_8bit cannot be sharded"),
        (["method=lora", "optimizer.optim=adagrad"], "the states of optimizer.optim=adagrad cannot be sharded"),
        (["method=lora", "optimizer=lorafa"], "optimizer=lorafa computes with whole matrices"),
        (["method=lora", "model.device_map={model: 0}"], "places one model on several devices"),
        (["method=lora", "training.torch_compile=true"], "torch_compile"),
        (["method=lora", "training.fp16=true"], "no loss scaling"),
        (["method=lora", "device=mps"], "needs GPUs of NVIDIA"),
    ],
)
def test_what_cannot_be_sharded_is_rejected(words: list[str], message: str):
    compose(words)
    for engine in ("fsdp", "deepspeed_zero3"):
        with pytest.raises(ConfigError, match=f"distributed={engine}.*{message}|{message}.*distributed={engine}"):
            compose([f"distributed={engine}", *words])


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed_zero3"])
def test_experiments_run_on_several_gpus(engine: str):
    refused = {}
    for name in options("experiment"):
        try:
            compose([f"experiment={name}", f"distributed={engine}", "distributed.num_processes=2"])
        except ConfigError as error:
            refused[name] = str(error)
    assert {*refused} == ({"qwen25_1_5b_alpaca_qlora"} if engine != "ddp" else set())
    assert all("states of optimizer.optim=paged_adamw_8bit cannot be sharded" in why for why in refused.values())


@pytest.mark.parametrize("words", [["method=lora", "method.adapter_dtype"], ["method=full", "model.dtype"]])
def test_zero3_trains_float32_only(words: list[str]):
    *method, key = words
    compose([*method, f"{key}=bfloat16", "distributed=fsdp"])
    compose([*method, f"{key}=float32", "distributed=deepspeed_zero3"])
    with pytest.raises(ConfigError, match=f"float32 copies of parameters in bfloat16: use {key}=float32"):
        compose([*method, f"{key}=bfloat16", "distributed=deepspeed_zero3"])


def test_torchao_base_is_rejected_by_all_engines():
    words = ["method=lora", "quantization=torchao_int8"]
    with pytest.raises(ConfigError, match=r"distributed=ddp cannot send .* torchao_int8 .*: choose quantization=int8"):
        compose([*words, "distributed=ddp"])
    with pytest.raises(ConfigError) as error:
        compose([*words, "distributed=fsdp"])
    assert str(error.value).endswith("choose quantization=nf4_double or none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["method=full"],
            "trains the model's own weights, not an adapter: merge it .`qlora-exp merge outputs/a --",
        ),
        (["method=adalora"], "method=adalora cannot train on .* ranks that its schedule has cut"),
        (["method=p_tuning"], "not the network that makes them.: train a new adapter"),
        (["method=prefix_tuning", "method.prefix_projection=true"], "not the network that makes them"),
        (["method=lora", "training.resume_from_checkpoint=."], "both say where training begins"),
    ],
)
def test_training_on_from_an_adapter_that_cannot_be_is_rejected(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose([*words, "model.adapter=outputs/a"])


def test_prompts_without_a_projection_can_be_trained_on():
    for word in ("models:/NAME@ALIAS", "models:/NAME/3", "a" * 32):
        assert compose(["method=prefix_tuning", f"model.adapter={word}"]).model.adapter == word
