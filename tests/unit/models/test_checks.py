"""What does not fit together is refused in one line, before weights are loaded and a run is begun."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from helpers.tiny_models import SPECIAL, save, tokenizer

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import checks
from qlora_exp.models.base import skeleton
from qlora_exp.utils.errors import ConfigError, DataError, ModelError

Q_PROJ = ["method=lora", "method.target_modules=[q_proj]"]
RESOLVED = resolve(compose(["device=cpu", "method=lora"]), Device("cpu", "CPU", bf16=False, paging=False))
EXPERTS = ["method=lora", "method.target_modules=[]", "method.lora_dropout=0"]


def check_adapter(family: str, *words: str) -> None:
    config = compose(["model=hub", f"model.model_name_or_path=random:{family}", *words])
    checks.check_adapter(config, skeleton(config.model))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders of models whose parts do not fit together."""
    folder = tmp_path_factory.mktemp("models")
    more = tokenizer(special=(*SPECIAL, "<tool>", "</tool>"))
    save(folder / "added", "llama", more, vocab_size=603)
    save(folder / "tied", "llama", tokenizer(), tie_word_embeddings=True)
    save(folder / "no_eos", "llama", tokenizer(eos_token=None))
    save(folder / "end_is_added", "llama", tokenizer(special=(*SPECIAL, "<end>"), eos_token="<end>"), vocab_size=603)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("llama", ["method=lora", "method.target_modules=[q_proj,lm_head]"], "method.modules_to_save=[lm_head]"),
        ("llama", ["method=lora", "method.target_modules='.*(q_proj|head)'"], "adapter on the output layer"),
        ("llama", ["method=lora", "method.target_modules=[mlp]"], "Target module LlamaMLP is not supported"),
        ("llama", ["method=lora", "+method.rank_pattern={q_prj: 8}"], "rank_pattern: 'q_prj' matches no adapted layer"),
        ("llama", ["method=lora", "+method.alpha_pattern={lm_head: 8}"], "alpha_pattern: 'lm_head' matches no adapted"),
        ("llama", ["method=lora", "method.modules_to_save=[lm_haed]"], "did you mean 'lm_head'?"),
        ("llama", ["method=lora", "+method.exclude_modules=[fc1]"], "exclude_modules: 'fc1' matches no module"),
        (
            "llama",
            ["method=trainable_tokens", "method.token_indices=[3,9000]"],
            "no tokens 9000; they go from 0 to",
        ),
        ("llama", [*Q_PROJ, "+method.layers_to_transform=[0,9]"], "no adapted layer has the number 9"),
        ("llama", ["method=lora", "method.modules_to_save=[norm]"], "also train model.layers.*.input_layernorm"),
        ("llama", ["method=lora", "method.target_modules='q_proj|v_proj'"], "whole names: '.*(q_proj|v_proj)'"),
        ("gpt_oss", [*EXPERTS, "+method.target_parameters=[experts.down_proj,w1]"], "'w1' matches no parameter"),
        ("gemma2", ["method=trainable_tokens"], "shares the embedding's weights"),
        ("phi", ["method=lora", "+method.trainable_token_indices={embed_tokens: [5], lm_head: [5]}"], "has biases"),
        ("qwen2", [*Q_PROJ, "method.layer_replication=[[0,1],[0,1]]"], "leave method.layer_replication out"),
        ("gpt2", ["method=lora", "lora_variant=olora"], "Conv1D"),
        ("gpt2", ["method=lora", "lora_variant=kasa"], "Conv1D"),
        ("gpt2", ["method=osf"], "it adapts none of its layers"),
        ("gpt2", ["method=lily"], "Lily does not support"),
        ("falcon", ["method=lora", "lora_variant=lora_ga"], "tested on a tiny falcon model"),
        ("falcon", ["method=prefix_tuning"], "Sizes of tensors must match"),
        ("phi3", ["method=ia3"], "PEFT has no default layers of PeftType.IA3 for a phi3 model"),
        ("mixtral", ["method=lora"], "set method.lora_dropout=0, or adapt the attention only"),
        ("mixtral", ["method=lora", "lora_variant=pissa", "method.lora_dropout=0"], "init_lora_weights=pissa does not"),
        ("mixtral", ["method=lora", "lora_variant=eva", "method.lora_dropout=0"], "init_lora_weights=eva does not"),
        ("qwen3_moe", ["method=lora", "lora_variant=dora", "method.lora_dropout=0"], "use_dora does not work on them"),
        ("qwen3_moe", ["method=prefix_tuning"], "mixture of experts"),
    ],
)
def test_adapter_that_does_not_fit_is_rejected(family: str, words: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        check_adapter(family, *words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", ["method=lora", "+method.rank_pattern={q_proj: 8}", "method.modules_to_save=[lm_head]"]),
        ("llama", ["method=lora", "+method.trainable_token_indices=[80,90]"]),
        ("llama", ["method=lora", "lora_variant=corda"]),
        ("llama", ["method=lora", "method.modules_to_save=[model.norm]"]),
        ("llama", ["method=waveft"]),
        ("gpt2", ["method=lora", "lora_variant=pissa"]),
        ("gpt_oss", [*EXPERTS, "+method.target_parameters=[experts.gate_up_proj]"]),
        ("mixtral", ["method=lora", "method.target_modules=attention", "lora_variant=pissa"]),
        ("mixtral", ["method=lora", "method.lora_dropout=0", "+method.rank_pattern={gate_up_proj: 8}"]),
        ("mixtral", ["method=qlora", "method.lora_dropout=0"]),
        (
            "phi3",
            ["method=ia3", "method.target_modules=[o_proj,down_proj]", "method.feedforward_modules=[down_proj]"],
        ),
        ("qwen3_moe", ["method=lora", "method.lora_dropout=0", "lora_variant=rslora"]),
    ],
)
def test_adapter_that_fits_is_accepted(family: str, words: list[str]):
    check_adapter(family, *words)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("no_eos", ModelError, "has no EOS token"),
        ("end_is_added", ModelError, r"its eos token '<end>' is 603; the model has 603 embeddings \(0 to 602\)"),
        ("adapter", ModelError, "holds an adapter, not a model; merge it into its base first"),
        ("added", DataError, r"row \d has the token '</tool>' \(604\)"),
    ],
)
def test_model_that_does_not_fit_leaves_no_run(
    name: str, kind: type[Exception], message: str, folders: Path, run_quick, write_jsonl, tmp_path
):
    rows = write_jsonl([{"prompt": f"call {i}", "completion": f"<tool>{i}</tool>" if i else "0"} for i in range(8)])
    words = ["model=hub", f"model.model_name_or_path={folders / name}", "method=lora", "dataset=own"]
    with pytest.raises(kind, match=message):
        run_quick(*words, f"dataset.path={rows}", "dataset.eval_size=2", folder="refused")
    assert not (tmp_path / "refused").exists()


def test_more_tokens_than_embeddings_are_accepted_if_no_row_has_them(folders: Path):
    config = compose(["model=hub", f"model.model_name_or_path={folders / 'added'}", "method=lora"])
    checks.check_model(
        config, RESOLVED, lambda made: {"training": Dataset.from_list([{"input_ids": made("call 0")["input_ids"]}])}
    )


def test_trained_tokens_of_a_tied_model_are_rejected_but_in_lora(folders: Path):
    tied = ["model=hub", f"model.model_name_or_path={folders / 'tied'}"]
    config = compose([*tied, "method=trainable_tokens"])
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        checks.check_adapter(config, skeleton(config.model))
    config = compose([*tied, "method=lora", "+method.trainable_token_indices=[80]"])
    checks.check_adapter(config, skeleton(config.model))


def test_blocks_that_read_weights_themselves_are_not_quantized():
    config = compose(["model=hub", "model.model_name_or_path=random:mamba", "method=qlora"])
    with pytest.raises(ConfigError, match=r"blocks of random:mamba read the weights of .*dt_proj.*quantization=none"):
        checks.check_model(config, RESOLVED, lambda _: {})


def test_biases_that_cannot_be_merged_are_reported(caplog):
    check_adapter("llama", *Q_PROJ, "method.lora_bias=true")
    assert "cannot be merged, exported or served" in caplog.text
    caplog.clear()
    check_adapter("gpt2", "method=lora", "method.lora_bias=true")  # its layers have biases
    assert "cannot be merged" not in caplog.text


def test_tokenizer_in_python_only_is_rejected(monkeypatch):
    slow = SimpleNamespace(eos_token="</s>")
    monkeypatch.setattr(checks, "load_tokenizer", lambda _: slow)
    with pytest.raises(ModelError, match="its tokenizer \\(SimpleNamespace\\) is not one of the tokenizers library"):
        checks.check_model(compose(["model=tiny_llama"]), RESOLVED, lambda _: {})


@pytest.mark.parametrize(("tying", "says"), [("", True), ("method.ensure_weight_tying=true", False)])
def test_tied_ends_that_are_trained_apart_are_reported(tying, says, caplog):
    tied = ["model=tiny_llama", "+model.random_config.tie_word_embeddings=true", "method=lora"]
    config = compose([*tied, "method.modules_to_save=[embed_tokens]", *tying.split()])
    checks.check_adapter(config, skeleton(config.model))
    assert ("trained apart" in caplog.text) == says
