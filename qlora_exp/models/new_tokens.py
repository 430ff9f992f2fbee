"""Add tokens to a tokenizer, and rows for them to a model's embedding and output layer.

A row begins as the mean of the rows of the tokens that the token's text consisted of before. LoRA trains these rows
only; full fine-tuning trains them with all others. Does not load models.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_exp.utils.errors import ConfigError

Parts = dict[int, list[int]]
"""Of each new token, by its number, the tokens that its text consisted of before."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str) -> Parts:
    """Add tokens to a tokenizer; they are ordinary ones, which decoding keeps.

    Args:
        tokenizer: the tokenizer; it is changed.
        texts: texts of the tokens.
        name: name of the model, for messages.

    Raises:
        ConfigError: one is a token already, or cannot be decoded.
    """
    known = tokenizer.get_vocab()
    if old := [text for text in texts if text in known]:
        raise ConfigError(
            f"model.new_tokens: {', '.join(map(repr, old))} {'are tokens' if len(old) > 1 else 'is a token'} of {name} "
            "already: leave out what is known (method.trainable_token_indices trains the embeddings of known tokens)"
        )
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    numbers: Any = tokenizer.convert_tokens_to_ids([*texts])
    for text, number in zip(texts, numbers, strict=True):
        if (decoded := tokenizer.decode([number])) != text:  # decoders of bytes take some letters for bytes
            raise ConfigError(
                f"model.new_tokens: the tokenizer of {name} would decode {text!r} as {decoded!r}: use letters of ASCII"
            )
    return dict(zip(numbers, parts, strict=True))


@torch.no_grad()
def add_rows(model: PreTrainedModel, parts: Parts) -> None:
    """Give a model rows for new tokens, and their first values.

    A model that has more rows than its tokenizer has tokens keeps its size if there is room.

    Args:
        model: the model, also without values (meta device); it is changed.
        parts: new tokens, as `add_tokens` returns them.

    Raises:
        ConfigError: the model has further tables with a row for each token.
    """
    embedding: Any = model.get_input_embeddings()
    count = len(embedding.weight)
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module is not embedding and len(module.weight) == count
    ]
    if tables:
        raise ConfigError(f"model.new_tokens: {', '.join(tables)} of this model would need rows for them too")
    if max(parts) >= count:
        model.resize_token_embeddings(max(parts) + 1, mean_resizing=False)
    for weight in _tables(model):
        for number, old in parts.items():
            if old:
                weight[number] = weight[old].float().mean(dim=0).to(weight.dtype)


def rows_to_train(model: PreTrainedModel, numbers: Iterable[int]) -> dict[str, list[int]]:
    """Return PEFT's `trainable_token_indices` that train the rows of these tokens: by the names of their layers.

    Raises:
        ConfigError: the output layer has biases, which PEFT leaves out where it trains rows.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            "model.new_tokens: the output layer of this model has biases, and PEFT cannot train single rows of it: use "
            "method=full"
        )
    names = {id(module): name for name, module in model.named_modules()}
    apart = head is not None and not model.config.get_text_config().tie_word_embeddings
    return {names[id(layer)]: [*numbers] for layer in ([embedding, head] if apart else [embedding])}


def _tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the weights of the embedding and of the output layer: one if they are the same."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [*{id(layer.weight): layer.weight for layer in layers if layer is not None}.values()]
