"""Check tokenizers and adapters that somebody else saved, before they are loaded.

What may run for ever or fill the memory is tried first in a process with limits.
"""

import functools
import logging
import string
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig

from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.models.base import no_stop_strings, skeleton
from qlora_exp.models.files import read_json
from qlora_exp.models.untrusted import check_folder, explained, most_values
from qlora_exp.utils.errors import ModelError
from qlora_exp.utils.processes.limits import FailedError, LimitError, call_limited

log = logging.getLogger(__name__)

_GENERATION = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_length",
    "max_new_tokens",
    "transformers_version",
    "_from_model_config",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
    "stop_strings",
}
_MOST_STOPS = 20


def kernels(values: Any) -> set[str]:
    """Return the implementations, at any depth of a config, that transformers would download from the hub and run."""
    if isinstance(values, list):
        return {kernel for value in values for kernel in kernels(value)}
    if not isinstance(values, dict):
        return set()
    own = {value for key, value in values.items() if key.endswith("implementation") and "/" in str(value)}
    return {str(value) for value in own} | {kernel for value in values.values() for kernel in kernels(value)}


def check_tokenizer(folder: Path) -> None:
    """Load a tokenizer and use it once, in a process with limits.

    A tokenizer can replace each character by a thousand others, many times over.

    Raises:
        ModelError: it is damaged, or needs too much time or memory.
    """
    check_folder(folder)
    _use_once(folder, tuple(file.stat().st_mtime_ns for file in sorted(folder.glob("tokenizer*"))))


@functools.cache  # for each change of its files
def _use_once(folder: Path, _changed: tuple[int, ...]) -> None:
    try:
        call_limited(_tokenize, folder, seconds=30, mib=2048)
    except LimitError as error:
        raise ModelError(f"{folder}: the tokenizer needs {error} for a short text") from error
    except FailedError as error:
        raise ModelError(f"{folder}: the tokenizer is missing or incomplete: {error}") from error


def _tokenize(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = f"{string.printable} Ünïcode, 你好 🙂 " * 4
    tokenizer.decode(tokenizer(text)["input_ids"])
    tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    if tokenizer.chat_template is not None and not isinstance(tokenizer.get_chat_template(), str):
        raise TypeError("chat_template must be a text")
    if not isinstance(tokenizer.eos_token, str):
        raise TypeError("eos_token must be a text")


def check_adapter(folder: Path, model: ModelConfig, peft_type: str | None) -> None:
    """Attach an adapter to the model without values, in a process with limits, before it is attached to the real one.

    An adapter's config has regular expressions, which can run for ever, and sizes.

    Args:
        folder: folder of the adapter.
        model: its base model.
        peft_type: type of the adapter according to the config of its run.

    Raises:
        ModelError: it is of another type, needs too much time or memory, or has more values than its files.
    """
    file = folder / "adapter_config.json"
    if (own := read_json(file).get("peft_type")) != peft_type:
        raise ModelError(f"{file}: peft_type is {own!r:.80}, but the config of its run says {peft_type}")
    try:
        base, adapter = call_limited(_attached, folder, model, seconds=30, mib=4096)
    except LimitError as error:
        raise ModelError(
            f"{file}: attaching the adapter needs {error}: its target_modules, patterns or sizes are not usable"
        ) from error
    except FailedError:
        return  # some methods need values; and the real attempt says what is wrong
    if adapter > base + most_values(folder):
        raise ModelError(f"{file} describes an adapter with {adapter:,} values, which its files have not")


def _attached(folder: Path, config: ModelConfig) -> tuple[int, int]:
    """Return the number of values of a base model, and of an adapter."""
    model = skeleton(config)
    base = sum(parameter.numel() for parameter in model.parameters())
    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    with torch.device("meta"):
        adapted = get_peft_model(model, settings)
    return base, sum(parameter.numel() for parameter in adapted.parameters()) - base


def use_own_generation(model: Any, folder: Path) -> None:
    """Keep of a complete model's generation_config.json only what begins, ends and pads, and how to sample.

    Its other settings would take effect wherever this program leaves them open: they can multiply answers, need a
    tokenizer, or name code on the hub. Those left out are logged.

    Raises:
        ModelError: a token is no number, or what ends an answer is no short text.
    """
    file = folder / "generation_config.json"
    if not (values := read_json(file)):
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = values.get(key)
        tokens = own if isinstance(own, list) else [own]
        if not all(token is None or (type(token) is int and 0 <= token < 2**31) for token in tokens):
            raise ModelError(f"{file}: {key} must be the number of a token, got {own!r:.80}")
    stops = values.get("stop_strings") or []
    if not (isinstance(stops, list) and len(stops) <= _MOST_STOPS and all(_is_short_text(text) for text in stops)):
        raise ModelError(f"{file}: stop_strings must be at most {_MOST_STOPS} short texts, got {stops!r:.80}")
    if left_out := values.keys() - _GENERATION:
        log.warning("%s: not used: %s", Path(*file.parts[-2:]), ", ".join(sorted(left_out))[:200])
    with explained(str(file)):
        model.generation_config = GenerationConfig(**{key: values[key] for key in _GENERATION & values.keys()})


def _is_short_text(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 200


@torch.no_grad()
def generate_once(model: Any, what: str) -> None:
    """Generate one token: a config can ask for what fails only when the model is used.

    Raises:
        ModelError: this fails.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=0)
    with explained(what), no_stop_strings(model):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
