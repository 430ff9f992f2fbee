"""Tiny models and tokenizers written as GGUF files."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_exp.deploy import gguf

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,  # more rows than tokens
}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


TEXT = "How long does concrete need in 2026, i.e. 28 days?\n\tIt's Ünïcode,  isn't it: x = f(1234567)"


def split(pattern: str):
    """Make a byte-level pre-tokenizer that splits by a pattern."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": split(gguf._WORDS % "{1,3}"),
    "qwen2": split(gguf._WORDS % ""),
}


def make_tokenizer(pre) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with a few merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def make_pieces() -> PreTrainedTokenizerFast:
    """Make a tokenizer like the converted one of Llama 2: all pairs of pieces that join, earlier ones first."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator([TEXT, "concrete can carry a load"] * 3, trainers.BpeTrainer(vocab_size=110))
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().get)
    order = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {piece: place for place, piece in enumerate(order)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_tiny_gguf(folder, model_type: str, pre="gpt-2", type_="f32", scale: bool = False, **fields):
    """Write a tiny model to `folder`; with `scale` its weights are so large that attention is sharp."""
    tokenizer = make_pieces() if pre == "pieces" else make_tokenizer(SPLITS.get(pre, pre))
    config = AutoConfig.for_model(model_type, **(SMALL | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, one in model.named_parameters():  # norms and biases that differ
        if one.ndim == 1:
            one.data += 0.1 * torch.randn_like(one)
            assert "weight" in name or "bias" in name
        elif scale:
            one.data *= 30 if "q_proj" in name or "k_proj" in name else 8
    tokenizer.save_pretrained(folder)
    gguf.write(model, tokenizer, folder, folder / "model.gguf", type_, "tiny")
    return model, tokenizer
