"""Write the config and the tokenizer of a saved model so that transformers 4 reads them too. Checked on 5.23.0.

transformers 5 gave several fields other names. Version 4, and programs that contain it, ignore the new ones without a
word: a Llama then has another base of its rotary positions, which is another model.
"""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

log = logging.getLogger(__name__)

_GENERIC = "PreTrainedTokenizerFast"
_ADDS_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes that in version 4 begin every text with BOS, whatever tokenizer.json says."""
_OWN_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
_LOCAL_THETA = ("gemma3", "gemma3_text", "gemma3n_text")
_PLACES = ("rope_theta", "partial_rotary_factor")
"""Entries of `rope_parameters` that have a place of their own in version 4."""


def add_old_names(folder: Path) -> None:
    """Add the field names of transformers 4 to `config.json` and `tokenizer_config.json`, where they are in a folder.

    What version 5 reads stays the same. What has no form in version 4 is logged. Models with code of their own read
    their files themselves, which are left as they are.
    """
    for name, change in (("config.json", _change_config), ("tokenizer_config.json", _change_tokenizer)):
        file = folder / name
        if file.is_file() and "auto_map" not in (values := json.loads(file.read_text("utf-8"))):
            change(file, values)


def _change_config(file: Path, values: dict[str, Any]) -> None:
    before = AutoConfig.from_pretrained(file.parent).to_dict()
    _write(file, _with_old_names(values))
    if not _contains(AutoConfig.from_pretrained(file.parent).to_dict(), before):
        _write(file, values)
        log.warning("config.json can be read by transformers 5 only: in version 4 this would be another model")


def _contains(values: Any, wanted: Any) -> bool:
    if isinstance(values, dict) and isinstance(wanted, dict):
        return all(key in values and _contains(values[key], value) for key, value in wanted.items())
    return bool(values == wanted)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _with_old_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config, or a part of one, with the names of both versions."""
    values = {key: _with_old_names(value) if key.endswith("_config") and isinstance(value, dict) else value
              for key, value in values.items()}  # fmt: skip
    if values.get("dtype") is not None:
        values["torch_dtype"] = values["dtype"]
    rope, family = values.get("rope_parameters"), values.get("model_type")
    if not rope:
        return values
    if parts := {kind: part for kind, part in rope.items() if isinstance(part, dict)}:
        rope = parts.get("full_attention", {})
        if family in _LOCAL_THETA and (local := parts.get("sliding_attention")):
            values["rope_local_base_freq"] = local["rope_theta"]
        elif family != "olmo3" and any(part != rope for part in parts.values()):
            log.warning("config.json can be read by transformers 5 only: positions by kind of layer (%s)", family)
            return values
    for name in _PLACES:
        if rope.get(name) is not None:
            values |= {name: rope[name], _OWN_NAMES.get(str(family), {}).get(name, name): rope[name]}
    scaling = {key: value for key, value in rope.items() if key not in _PLACES and value is not None}
    if family == "phi3" and scaling.get("rope_type") == "longrope":  # version 4 takes exactly these three
        scaling = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    values["rope_scaling"] = None if scaling.keys() <= {"rope_type"} and rope["rope_type"] == "default" else scaling
    return values


def _change_tokenizer(file: Path, values: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(file.parent)
    ids = tokenizer("a")["input_ids"] or [None]
    ends = ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id
    kind = values.get("tokenizer_class")
    if kind == "TokenizersBackend" or (kind in _ADDS_BOS and ends != (True, False)):
        values["tokenizer_class"] = _GENERIC
        values.setdefault("model_input_names", tokenizer.model_input_names)  # token types too by default in version 4
    if isinstance(values.get("extra_special_tokens"), list):  # a mapping in version 4
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if named := values.get("model_specific_special_tokens"):
        if values.get("additional_special_tokens"):
            log.warning("tokenizer_config.json: special only to transformers 5: %s", ", ".join(named.values()))
        else:
            values["extra_special_tokens"] = named
    _write(file, values)
