"""Write a tokenizer into a GGUF file, if llama.cpp splits texts into the same tokens.

Contains llama.cpp's names of pre-tokenizers and what its two kinds of tokenizers do. tests/unit/deploy/gguf compares
tokens of hard texts with llama.cpp's.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import models

from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import begins_with_bos, short_prompt
from qlora_exp.deploy.gguf.families import SERVE
from qlora_exp.utils.errors import ConfigError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": ("GPT-2's words",),
    "smollm": ("digits", "GPT-2's words"),
    "smaug-bpe": (_WORDS % "{1,3}", "bytes"),
    "llama-bpe": (_WORDS % "{1,3}", "bytes"),
    "qwen2": (_WORDS % "", "bytes"),
}
"""How the tokenizers with these names in llama.cpp split a text."""
_WHOLE_WORDS = ("llama-bpe",)
"""Those of them that take a word that is a token as it is, whatever its merges (`ignore_merges`)."""
_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
"""How a tokenizer of pieces marks blanks, and puts one before a text."""
_NAMED = re.compile("(?<=phi)-?(?=3)|(?<=modern)-(?=bert)", re.IGNORECASE)
"""Names of models for which llama.cpp lets special tokens take blanks next to them."""
_KEEP_BLANKS = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens that take no blanks in such models."""


def check_tokenizer(tokenizer: Any) -> None:
    """Check that llama.cpp reads the same tokens as the tokenizer.

    Raises:
        ConfigError: it does not; the message says what the tokenizer does that llama.cpp does not.
    """
    if why := next(_unlike_llama_cpp(tokenizer, _backend(tokenizer)), None):
        raise ConfigError(
            f"--to gguf: this tokenizer is not supported: {why}, and llama.cpp would read other tokens. {SERVE}"
        )


def differences(tokenizer: Any) -> list[str]:
    """Return in which rare texts llama.cpp reads other tokens than a tokenizer that `check_tokenizer` accepts."""
    backend, said = _backend(tokenizer), []
    if any(part["type"] == "NFC" for part in _changes(backend)):
        said.append(
            "llama.cpp does not compose characters (NFC), as this tokenizer does: it reads other tokens where letters "
            "and their accents are separate characters"
        )
    scheme = _scheme(backend)
    if scheme != "never" and not _adds_space(tokenizer, backend):
        said.append(
            "the tokenizer puts a space before a text unless it begins with a special token, as prompts of the chat "
            "template do; llama.cpp reads the same tokens in them, and puts no space before other texts"
        )
    elif scheme != "never":
        after = ", and none after special tokens" if scheme == "first" else ""
        said.append(
            "llama.cpp puts a space before every text and after special tokens; the tokenizer puts none before a text "
            f"that begins with a space{after}"
        )
    return said


def model_name(name: str, tokenizer: Any) -> str:
    """Return a model's name for the GGUF file, with which llama.cpp treats blanks as the tokenizer does.

    After special tokens of models whose name has "phi-3", llama.cpp drops blanks.
    """
    if any(token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (as phi-3)"
    return _NAMED.sub("_", name)


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add tokens, merges and how a text is split.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: tokenizer that `check_tokenizer` accepts, with the chat template to keep.
        rows: rows of the embedding; those without a token get a placeholder token.
    """
    import gguf

    backend = _backend(tokenizer)
    bpe, pieces = backend["model"], _has_pieces(backend)
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType

    def kind(token_id: int) -> Any:
        if token_id not in texts:
            return kinds.UNUSED
        if token_id in added:
            return kinds.CONTROL if added[token_id].special else kinds.USER_DEFINED
        return kinds.BYTE if pieces and re.fullmatch("<0x[0-9A-F]{2}>", texts[token_id]) else kinds.NORMAL

    writer.add_token_list([texts.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)])
    writer.add_token_types([kind(token_id) for token_id in range(rows)])
    if pieces:
        # llama.cpp joins the pair with the highest score first, so earlier merges get higher scores.
        ranks = _first_ranks(bpe)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        least = -float(len(bpe["merges"]))
        writer.add_token_scores([-float(ranks.get(texts.get(token_id, ""), -least)) for token_id in range(rows)])
        writer.add_add_space_prefix(_adds_space(tokenizer, backend))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name(backend))
        # llama.cpp reads no such tokenizer without merges. This one never applies: its characters encode no byte.
        writer.add_token_merges([" ".join(pair) for pair in _pairs(bpe)] or ["\u2603 \u2603"])
    for role in ("bos", "eos", "unk", "pad"):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    # With this, llama.cpp begins each prompt with BOS, whether or not the chat template does.
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)  # a prompt does not end with it
    if tokenizer.chat_template:
        end = end_of_turn(tokenizer, tokenizer.get_chat_template()).token
        if end not in (None, tokenizer.eos_token_id):
            writer.add_eot_token_id(end)  # llama.cpp ends an answer at it, as at EOS; the format has no place for text
        writer.add_chat_template(tokenizer.get_chat_template())
    else:  # without any, llama.cpp would render ChatML
        writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def _backend(tokenizer: Any) -> dict[str, Any]:
    """Return the content of a tokenizer's tokenizer.json."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content


def _changes(backend: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what changes a text before it is split, in order."""
    normalizer = backend["normalizer"]
    return [part for part in (normalizer or {}).get("normalizers", [normalizer]) if part]


def _pairs(bpe: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges, which older files have as texts with a blank."""
    halves = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in bpe["merges"])
    return [(left, right) for left, right in halves]


def _first_ranks(bpe: dict[str, Any]) -> dict[str, int]:
    """Return the rank of the first merge that makes each token."""
    return {left + right: rank for rank, (left, right) in reversed([*enumerate(_pairs(bpe))])}


def _has_pieces(backend: dict[str, Any]) -> bool:
    """Return whether the tokens are pieces of SentencePiece, as in Llama 2 and Gemma; else they are bytes."""
    return bool(backend["model"].get("byte_fallback")) and not _splits(backend["pre_tokenizer"])


def _name(backend: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of a tokenizer that splits a text like this one; None if it has none.

    One that also takes words that are tokens without merging them comes first, if it makes no difference.
    """
    splits = _splits(backend["pre_tokenizer"])
    names = [name for name, same in SPLITS.items() if same == splits]
    whole = bool(backend["model"].get("ignore_merges"))
    if len(names) > 1 and not whole:
        whole = _merges_make_all(backend)
    return next((name for name in names if (name in _WHOLE_WORDS) == whole), names[0] if names else None)


def _unlike_llama_cpp(tokenizer: Any, backend: dict[str, Any]) -> Iterator[str]:
    """Yield what a tokenizer does that the tokenizers of llama.cpp do not."""
    bpe = backend["model"]
    if bpe["type"] != "BPE":
        yield f"its tokens are of type {bpe['type']}"
        return
    if any(bpe.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        yield "it marks or drops parts of words"
    changes = _changes(backend)
    if _has_pieces(backend):
        yield from _unlike_pieces(backend, changes)
        if _scheme(backend) == "first" and tokenizer.chat_template and not _begins_with_special_token(tokenizer):
            yield "it puts a space before a prompt, but none after special tokens in it"
    elif (name := _name(backend)) is None:
        yield f"it splits a text by {', '.join(_splits(backend['pre_tokenizer'])) or 'nothing'}"
    else:
        if others := [part["type"] for part in changes if part["type"] != "NFC"]:
            yield f"it changes texts by {', '.join(others)}"
        if bool(bpe.get("ignore_merges")) != (name in _WHOLE_WORDS) and not _merges_make_all(backend):
            yield "it takes words that are tokens without merging them (ignore_merges)"
    yield from _unlike_added_tokens(tokenizer)


def _unlike_pieces(backend: dict[str, Any], changes: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what a tokenizer of pieces does that llama.cpp's does not: it joins whatever makes a token."""
    bpe, pre_tokenizer = backend["model"], backend["pre_tokenizer"] or {}
    if others := [part["type"] for part in changes if part not in (_MARK, _PREPEND)]:
        yield f"it changes texts by {', '.join(others)}"
    if pre_tokenizer.get("type") != "Metaspace" and _MARK not in changes:
        yield "it has no mark for blanks"
    if _PREPEND in changes and (changes.index(_PREPEND) > 0 or pre_tokenizer.get("type") == "Metaspace"):
        yield "it puts several blanks before a text"
    vocab, pairs, ranks = bpe["vocab"], set(_pairs(bpe)), _first_ranks(bpe)
    if any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        yield "it has no token for some bytes"
    for token in vocab:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if any(left in vocab and right in vocab and (left, right) not in pairs for left, right in halves):
            yield f"it does not join all pairs of tokens that make another one ({token!r})"
            return
    in_order = [ranks[left + right] for left, right in _pairs(bpe)]
    if in_order != sorted(in_order):
        yield "its merges that make the same token do not follow one another"


def _unlike_added_tokens(tokenizer: Any) -> Iterator[str]:
    """Yield what a tokenizer does with special and other added tokens that llama.cpp does not."""
    added = tokenizer.added_tokens_decoder.values()
    taking = [token for token in added if token.rstrip]
    keeping = [token.content for token in added if not token.rstrip]
    # As in Phi-3, which llama.cpp knows by its name: all but three tokens, all of which it must have.
    as_phi3 = sorted(keeping) == sorted(_KEEP_BLANKS) and "</s>" in tokenizer.get_vocab()
    odd = [token for token in added if token.lstrip or token.single_word] + ([] if as_phi3 else taking)
    if odd:
        yield f"its token {odd[0].content!r} takes blanks next to it, or stands alone only"
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    begin = next((place for place in range(len(ids)) if ids[place : place + len(plain)] == plain), len(ids))
    if ids[:begin] not in ([], [tokenizer.bos_token_id]):
        yield f"it begins texts with {tokenizer.convert_ids_to_tokens(ids[:begin])}"


def _merges_make_all(backend: dict[str, Any]) -> bool:
    """Return whether merging the characters of each token, but added ones, makes the token."""
    bpe, added = backend["model"], {token["content"] for token in backend["added_tokens"]}
    merging = models.BPE(bpe["vocab"], _pairs(bpe), ignore_merges=False)
    return all([token.value for token in merging.tokenize(text)] == [text] for text in bpe["vocab"].keys() - added)


def _adds_space(tokenizer: Any, backend: dict[str, Any]) -> bool:
    """Return whether llama.cpp must put a space before texts, at the beginning and after special tokens.

    A pre-tokenizer puts none before a text that begins with one, and `first` none after special tokens: prompts of a
    chat template that begins with a special token never get one.
    """
    if _PREPEND in _changes(backend):
        return True
    scheme = _scheme(backend)
    if scheme == "never":
        return False
    return scheme == "always" or not _begins_with_special_token(tokenizer)


def _scheme(backend: dict[str, Any]) -> str:
    """Return where a pre-tokenizer puts a space before a text: always, first (not after special tokens) or never."""
    parts = [backend["pre_tokenizer"] or {}]
    parts += parts[0].get("pretokenizers", [])
    return next((part["prepend_scheme"] for part in parts if part.get("type") == "Metaspace"), "never")


def _begins_with_special_token(tokenizer: Any) -> bool:
    """Return whether prompts of the chat template do; false without one."""
    prompt = short_prompt(tokenizer) or ""
    return any(prompt.startswith(token.content) for token in tokenizer.added_tokens_decoder.values())


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Return what a pre-tokenizer of tokenizer.json splits a text by, in order."""
    match pre_tokenizer:
        case None | {"type": "Metaspace", "replacement": "▁", "split": False}:
            return ()
        case {"type": "Split", "pattern": {"String": " "}}:  # Gemma's: its normalizer has left no blank
            return ()
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(split for part in parts for split in _splits(part))
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ("GPT-2's words",) if pre_tokenizer.get("use_regex", True) else ("bytes",)
    return (json.dumps(pre_tokenizer),)
