"""Tiny models and tokenizers written as GGUF files."""

import json

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_exp.deploy.gguf.tokenizers import SPLITS as NAMES
from qlora_exp.deploy.gguf.write import write

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


WITHOUT_GROUPS = ("gpt2", "gpt_neox")
"""Families whose heads have keys and values of their own."""

HARD_TEXTS = [
    "", " ", "  ", "a", "\n", "\n\n\n", "\t\t x", " \t\n \r\n  y", "x\r\r\ny", "\r", "a\r\nb", " \n \n ", "x  \n\n  y",
    " leading", "trailing ", "A  B   C    D     E", "   def f(x):\n        return x  +  1  # ok\n",
    "12345 1234 12 1 1234567890123456789", "1a2b3c", "३४५ ٣٤٥ Ⅷ ½ ²", "１２３ ＡＢＣ",  # noqa: RUF001
    "don't DON'T I'LL they\u2019re \u2019s 'S '\u017f", "I'm'd''s  's", "'tis 'Tis 'LL'",
    "naïve café e\u0301te\u0301 n\u0303 a\u0308\u0327", "a\u0301\u0301\u0301", "\u0301x", "Ünïcode ǅ ŉ ß ﬁ",
    "日本語のテキスト、漢字。中文字符！한국어 텍스트", "\ud7a3\u1112\u1161\u11ab", "नमस्ते दुनिया ภาษาไทย தமிழ்",  # noqa: RUF001
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 🙂🙂 ❤️", "x\u200d", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐷", "ﷺ ꧅",  # noqa: RUF001
    "שלום עולם مرحبا بالعالم\u200f \u202eabc", "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u2029h\u0085i",
    "\u00ad soft",
    "</s>a<s>", "<s> hello</s> \n<unk>x", "<|im_start|>user\nhi<|im_end|>", "<0x0A><0x41>▁▁ a▁b",
    "$100,000.00 != €5 <= ¥7 `code` ~x~ ^2 |a| {b} [c] \\d", "http://a.b/c?d=e&f=%20#g",
    "_under_score__ --dash-- ... ?!?!",
    "a\x00b\x01\x7f", "long" * 40, "snake_case camelCase HTTPServer v2.0.1",
]  # fmt: skip
"""Blanks, digits, apostrophes, marks, scripts, emoji, control characters, special tokens and code."""


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
    "llama-bpe": split(NAMES["llama-bpe"][0]),
    "qwen2": split(NAMES["qwen2"][0]),
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


def make_ascii() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of ASCII: llama.cpp gives no probabilities of parts of characters."""
    letters = [chr(code) for code in range(33, 127)]
    pairs = [(left, right) for left in "abcdefghijklmno" for right in "abcdefghijklmno"][:203]
    order = ["<unk>", "<s>", "</s>", *letters, *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE({text: place for place, text in enumerate(order)}, pairs))
    backend.pre_tokenizer, backend.decoder = SPLITS["gpt-2"], decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_pieces(*more: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer like the converted one of Llama 2: all pairs of pieces that join, earlier ones first."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator([TEXT, "concrete can carry a load"] * 3, trainers.BpeTrainer(vocab_size=110))
    pieces = [*sorted(learned.get_vocab(), key=learned.get_vocab().get), *more]
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


def as_gemma(tokenizer) -> PreTrainedTokenizerFast:
    """Let a tokenizer of pieces mark blanks as Gemma's does, without one before a text."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def as_phi3(tokenizer) -> PreTrainedTokenizerFast:
    """Give a tokenizer of pieces the special tokens of Phi-3, which take the blanks after them."""
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.add_tokens([AddedToken(one, rstrip=True, special=True) for one in ("</s>", "<|user|>", "<|end|>")])
    return tokenizer


def taking_whole_words(tokenizer) -> PreTrainedTokenizerFast:
    """Let a tokenizer take a word that is a token, though its merges do not make it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["ignore_merges"] = True
    backend["model"]["vocab"]["1234567"[:3]] = len(tokenizer)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **special)


def with_metaspace(tokenizer, scheme: str) -> PreTrainedTokenizerFast:
    """Let a tokenizer of pieces mark blanks by a pre-tokenizer."""
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    return tokenizer


def with_added_tokens(tokenizer) -> PreTrainedTokenizerFast:
    """Add tokens that are not special."""
    tokenizer.add_tokens(["<|im_start|>", "\n\n", "\t\t", "def"])
    return tokenizer


TOKENIZERS = {
    "gpt-2": lambda: make_tokenizer(SPLITS["gpt-2"]),
    "smollm": lambda: make_tokenizer(SPLITS["smollm"]),
    "smaug-bpe": lambda: make_tokenizer(SPLITS["llama-bpe"]),
    "llama-bpe": lambda: taking_whole_words(make_tokenizer(SPLITS["llama-bpe"])),
    "qwen2": lambda: make_tokenizer(SPLITS["qwen2"]),
    "added": lambda: with_added_tokens(make_tokenizer(SPLITS["qwen2"])),
    "pieces": make_pieces,
    "gemma": lambda: with_added_tokens(as_gemma(make_pieces())),
    "phi-3": lambda: as_phi3(make_pieces()),
    "never": lambda: with_metaspace(make_pieces(), "never"),
}
"""Tokenizers that llama.cpp has."""


def make_model(model_type: str, **fields):
    """Make a tiny random model whose norms and biases differ."""
    sizes = {key: value for key, value in SMALL.items() if model_type not in WITHOUT_GROUPS or "key_value" not in key}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **(sizes | special | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for one in model.parameters():
        if one.ndim == 1:
            one.data += 0.1 * torch.randn_like(one)
    return model


def trained(model):
    """Make the matrices of a model so large that attention is sharp, train it with LoRA and merge that."""
    for one in model.parameters():
        if one.ndim > 1:
            one.data *= 4
    wide = {"fan_in_fan_out": True} if model.config.model_type == "gpt2" else {}
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **wide))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    ids = torch.randint(3, 300, (2, 24))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload().eval()


def write_tiny_gguf(folder, model_type: str, pre="gpt-2", type_="f32", train: bool = False, **fields):
    """Write a tiny model to `folder`, with `train` after some training."""
    made = {"pieces": make_pieces, "ascii": make_ascii}
    tokenizer = made[pre]() if pre in made else make_tokenizer(SPLITS.get(pre, pre))
    model = make_model(model_type, **fields)
    model = trained(model) if train else model
    write(model, tokenizer, folder / "model.gguf", type_, "tiny")
    return model, tokenizer


def exact_server(file):
    """Start llama.cpp with keys and values in 32 bits, in which it can be compared with transformers."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers = str(file), 128, 0
    settings.cpuparams.n_threads, settings.n_parallel, settings.warmup, settings.verbosity = 1, 1, False, 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    server.handle_completions({"prompt": [0], "n_predict": 1})
    return server


def largest_difference(server, model, ids: list[int]) -> tuple[float, int]:
    """Return how far llama.cpp's log probabilities are from transformers', and after how many of the tokens they are.

    The difference is a share of the largest of them. llama.cpp gives none after an end of text.
    """
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    request = {"n_predict": 1, "n_probs": model.config.vocab_size, "temperature": 0, "cache_prompt": False}
    largest, compared = 0.0, 0
    for count in range(1, len(ids) + 1):
        choice = server.handle_completions(request | {"prompt": ids[:count]})["choices"][0]
        if content := (choice.get("logprobs") or {}).get("content"):
            values = {one["id"]: one["logprob"] for one in content[0]["top_logprobs"]}
            found = torch.tensor([values[place] for place in sorted(values)])
            largest = max(largest, (found - expected[count - 1, sorted(values)]).abs().max().item())
            compared += 1
    return largest / expected.abs().max().item(), compared
