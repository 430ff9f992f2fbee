"""Tiny models of any architecture with random weights, made in a second, and their tokenizers."""

import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _learned_core(space: bool) -> str:
    """Learn 600 tokens from Python's own documentation."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(list(pydoc_data.topics.topics.values())[:40], trainer)
    return core.to_str()


def tokenizer(
    special: tuple[str, ...] = SPECIAL,
    template: str | None = CHATML,
    space: bool = False,
    single: str | None = None,
    **named: Any,
) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer.

    Args:
        special: its special tokens.
        template: its chat template.
        space: whether a space is put before every text.
        single: what stands around every text, such as `<|begin|> $A`.
        named: tokens with a role, such as `eos_token`.
    """
    core = Tokenizer.from_str(_learned_core(space))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if single:
        tokens = [(token, core.token_to_id(token)) for token in special if token in single]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **named}
    made = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=2048, **named)
    made.chat_template = template
    return made


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def save(folder: Path | str, kind: str, tokenizer: Any, **fields: Any) -> str:
    """Save a model of transformers' `model_type` with fixed random weights, and the tokenizer; return the folder.

    Args:
        folder: where to save both.
        kind: the model's type, such as `gpt2`.
        tokenizer: its tokenizer.
        fields: fields of the model's config; sizes that are not given are tiny.
    """
    sizes = SIZES | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | fields))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
