"""Tiny models of many families with random weights: made in a second, without the network."""

import pydoc_data.topics
from functools import lru_cache
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


@lru_cache
def _trained(space: bool) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=space), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(list(pydoc_data.topics.topics.values())[:40], trainer)
    return str(core.to_str())


def tokenizer(
    special: tuple[str, ...] = SPECIAL,
    template: str | None = CHATML,
    space: bool = False,
    single: str | None = None,
    **named: Any,
) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer.

    Args:
        special: the special tokens.
        template: the chat template.
        space: whether a space is put before the first word.
        single: what stands around every text, such as `<|begin|> $A`.
        named: further arguments, such as `eos_token`.
    """
    core = Tokenizer.from_str(_trained(space))
    core.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    if single:
        tokens = [(one, core.token_to_id(one)) for one in special if one in single]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **named}
    made = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=2048, **named)
    made.chat_template = template
    return made


def save(folder: Path | str, kind: str, tokenizer: PreTrainedTokenizerFast, **fields: Any) -> str:
    """Save a model of a family (transformers' model type) of about 100,000 random weights; return its folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | fields)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
