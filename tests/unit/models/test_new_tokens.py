"""New tokens are one token each, have rows in a model, begin as the mean of what they were, and are trained alone."""

import pytest
import torch
from helpers.tiny_models import SIZES, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.models import base
from qlora_exp.models.adapters import peft_config
from qlora_exp.models.new_tokens import add_rows, add_tokens, rows_to_train
from qlora_exp.utils.errors import ConfigError

LETTERS = st.characters(codec="utf-8", exclude_categories=("C", "Z"))
TEXTS = st.lists(st.text(LETTERS, min_size=2, max_size=9), min_size=1, max_size=4, unique=True)
BYTES = {*pre_tokenizers.ByteLevel.alphabet()}
BOTH = ["<tool>", "</tool>"]


def make(kind: str = "llama", rows: int = 603, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | {"vocab_size": rows} | fields))


@given(TEXTS, st.text(max_size=20))
def test_a_new_token_is_one_token_wherever_its_text_is(texts, around):
    made = tokenizer()
    known = made.get_vocab()
    if [text for text in texts if text in known]:
        with pytest.raises(ConfigError, match="already"):
            add_tokens(made, texts, "it")
        return
    if any(not text.isascii() and {*text} <= BYTES for text in texts):
        with pytest.raises(ConfigError, match="would decode"):  # such as ¡, which stands for the byte 0xA1 in tokens
            add_tokens(made, texts, "it")
        return
    parts = add_tokens(made, texts, "it")
    assert [*parts] == [*range(len(made) - len(texts), len(made))]
    longest = max(texts, key=len)
    ids = made(f"a {longest} b", add_special_tokens=False)["input_ids"]
    assert [number for number in ids if number in parts] == [made.convert_tokens_to_ids(longest)]
    # What decoding gives back is the text, in which answers keep the new tokens.
    assert made.decode(made(around + longest)["input_ids"], skip_special_tokens=True).endswith(longest)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [603, 640])
def test_rows_begin_as_the_mean_of_what_the_text_consisted_of(tied: bool, rows: int):
    model, made = make(rows=rows, tie_word_embeddings=tied), tokenizer()
    tables = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    parts = add_tokens(made, BOTH, "it")
    add_rows(model, parts)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (after[0] is after[1]) is tied
    for table, now in zip(tables, after, strict=True):
        assert len(now) == max(rows, 605)  # 640: the model had rows to spare
        assert torch.equal(now[:603], table[:603])
        for number, old in parts.items():
            assert len(old) > 1
            assert torch.allclose(now[number], table[old].mean(dim=0))
    assert model.config.vocab_size == max(rows, 605)


def test_rows_are_those_of_the_embedding_and_of_an_output_layer_of_its_own():
    assert rows_to_train(make(), [603]) == {"model.embed_tokens": [603], "lm_head": [603]}
    assert rows_to_train(make(tie_word_embeddings=True), [603]) == {"model.embed_tokens": [603]}
    with pytest.raises(ConfigError, match="output layer of this model has biases"):
        rows_to_train(make("phi", partial_rotary_factor=0.5), [603])


def test_model_with_further_tables_is_rejected():
    model = make()
    model.model.per_layer = torch.nn.Embedding(603, 8)
    with pytest.raises(ConfigError, match=r"model\.per_layer of this model would need rows"):
        add_rows(model, {603: [1, 2]})


def test_known_tokens_are_rejected_by_name():
    config = ModelConfig(model_name_or_path="random:llama", new_tokens=["<tool>", "<|im_end|>"])
    with pytest.raises(ConfigError, match=r"'<\|im_end\|>' is a token of random:llama already: leave out"):
        base.load_tokenizer(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ia3"], "method=ia3 cannot train their embeddings: use method=lora, qlora or full"),
        (["method=lora", "+method.trainable_token_indices=[5]"], "sets method.trainable_token_indices: leave that out"),
        (["method=lora", "lora_variant=pissa"], "with no place for their embeddings"),
        (["method=lora", "lora_variant=eva"], "EVA does not run with trained rows"),
        (["method=lora", "distributed=fsdp"], "cannot shard an embedding of which single rows are trained"),
        (["method=lora", "quantization=quanto_int4"], "stored as quanto_int4 were never tested"),
    ],
)
def test_what_cannot_train_new_tokens_is_rejected_at_once(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose(["model=tiny_llama", 'model.new_tokens=["<tool>"]', *words])


@pytest.mark.parametrize("texts", [[""], [" a"], ["a", "a"], ["x" * 65], ["\n"], ["a\x1b[31m"], ["t"] * 1001])
def test_text_that_is_no_token_is_rejected(texts: list[str]):
    with pytest.raises(ValueError, match="new_tokens"):
        ModelConfig(new_tokens=texts)


def test_whole_embeddings_are_trained_if_they_are_named():
    words = ["model=tiny_llama", 'model.new_tokens=["<tool>"]', "method=lora"]
    config = compose([*words, "method.modules_to_save=[embed_tokens]"])
    settings = peft_config(config, base.skeleton(config.model))
    assert settings.trainable_token_indices == {"lm_head": [259]}
