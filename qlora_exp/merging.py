"""An adapter's weights in its base's: a model that needs no adapter, and how far what it says is from the two apart.

Works on the CPU, a layer at a time. Knows nothing of runs but the folders that they save.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from qlora_exp import compatibility, quantization
from qlora_exp.device import Device, resolve
from qlora_exp.errors import ConfigError, ModelError
from qlora_exp.loading import Saved
from qlora_exp.memory import size_on_disk
from qlora_exp.model import load_model, load_unquantized
from qlora_exp.provenance import libraries
from qlora_exp.schema import Config

FACTS_FILE = "merged.json"
Base = Literal["auto", "files", "trained"]
_TEXT = (
    "The bridge was closed for two years. When it opened again, the people of both towns came to see what had been "
    "done: new stone, new lamps, and a narrow path for bicycles. How long does concrete need before it can carry load? "
    "Usually it is said that it takes twenty-eight days, but def f(x): return x + 1 is no answer to that."
)
_ROUNDINGS = 32
"""How many roundings of the largest logit the merged model may be off: layers after one another add theirs."""


@dataclass(frozen=True)
class Merged:
    """What was made."""

    folder: str
    base: str
    """Which weights the adapter was merged into, and why."""
    dtype: str
    max_logit: float
    max_logit_difference: float
    """Of the merged model as it was read back, from base and adapter apart, on a paragraph of text."""
    mean_kl: float
    """Nats a token, of the merged model's next tokens from theirs."""
    same_first_choice: float
    """Share of tokens after which both find the same next token likeliest."""
    bytes: int


def merge(saved: Saved, out: Path, dtype: str = "auto", base: Base = "auto") -> Merged:
    """Write a model of transformers' own kind: the base with the adapter in its weights, and the tokenizer.

    Args:
        saved: what a run saved.
        out: a folder that is not there yet; it appears whole or not at all.
        dtype: of the merged weights: float32, bfloat16, float16; auto is that of the base's files.
        base: `files`, the base as its files are; `trained`, what the quantized weights that it was trained on stand
            for; auto is `files`, unless those are quantized themselves.

    Raises:
        ConfigError: there is nothing to merge, it cannot be merged, or there is no room for it.
        ModelError: base and adapter do not belong together, a file is damaged, or the merged model says other things.
    """
    if not saved.adapter:
        raise ConfigError(f"{saved.folder}: a full model already, without an adapter to merge")
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; choose another, or delete it")
    config = saved.config
    kind = compatibility.kind_of(config.method.peft_type, config.lora_variant.name)
    if why := compatibility.refusal(kind, "plain", "merge"):
        raise ConfigError(f"method={config.method.name} cannot be merged: {why}")
    model, told = _base(config, dtype, base)
    tokenizer = saved.tokenizer()
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the base only {rows}: it is for another base")
    ids = tokenizer(_TEXT, return_tensors="pt").input_ids
    adapted = _adapted(model, saved.folder)
    expected = _logits(adapted, ids)
    whole = _merged(adapted)
    needed = sum(tensor.nbytes for tensor in whole.state_dict().values())
    with _appearing(out, needed) as part:
        whole.save_pretrained(part, max_shard_size="4GB")
        tokenizer.save_pretrained(part)
        name = str(whole.dtype).removeprefix("torch.")
        del model, adapted, whole
        found = _logits(_read_back(part), ids)
        told_of = Merged(
            str(out),
            told,
            name,
            expected.abs().max().item(),
            *_distance(found, expected),
            size_on_disk(part),
        )
        _check(told_of)
        facts = asdict(told_of) | {"adapter": saved.source, "libraries": libraries()}
        facts |= {"model_name_or_path": config.model.model_name_or_path, "revision": config.model.revision}
        (part / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return told_of


def _base(config: Config, dtype: str, base: Base) -> tuple[Any, str]:
    """The weights to merge into, and which they are and why."""
    name, stored = config.model.model_name_or_path, config.quantization
    files_are_quantized = stored.quant_method in ("gptq", "awq")
    if base == "files" and files_are_quantized:
        raise ConfigError("--base files: those are quantized themselves; use --base trained")
    if not stored.quantized:
        return load_unquantized(config.model, dtype), f"{name}, as its files are"
    if base == "trained" or files_are_quantized:
        resolved = resolve(config, Device("cpu", "CPU", bf16=False, paging=False))
        model = load_model(config.model, stored, resolved)
        wanted = resolved.dtype if dtype == "auto" else dtype
        return quantization.dequantized(model, getattr(torch, wanted)), (
            f"{name}, what its weights stored as {stored.name} stand for: "
            + ("its files have no others" if files_are_quantized else "what the adapter was trained on")
        )
    return load_unquantized(config.model, dtype), (
        f"{name}, as its files are: what {stored.name} lost of them is not kept (--base trained keeps it)"
    )


def _adapted(model: Any, folder: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder}: a file of the adapter is damaged ({error})") from error
    except (RuntimeError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise ModelError(f"{folder}: does not fit its base {model.config._name_or_path}: {first:.300}") from error


@torch.no_grad()
def _merged(adapted: PeftModel) -> Any:
    """The base with the adapter's weights; each layer is merged in float32 and rounded once."""
    tuner: Any = adapted.base_model
    if adapted.active_peft_config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise ConfigError(f"{adapted.active_peft_config.peft_type} has no weights that could be merged into the base's")
    try:
        for layer in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
            own: Any = layer.get_base_layer()
            dtypes = {name: tensor.dtype for name, tensor in own.named_parameters(recurse=False)}
            for name in dtypes:
                getattr(own, name).data = getattr(own, name).data.float()
            layer.merge(safe_merge=True)
            for name, dtype in dtypes.items():
                getattr(own, name).data = getattr(own, name).data.to(dtype)
        whole = tuner.unload()
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"cannot be merged: {error}") from error
    whole.config.use_cache = True
    return whole


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits[0].float()


def _read_back(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float, float]:
    """Largest difference, mean KL divergence in nats, share of tokens with the same first choice; (tokens, words)."""
    apart, together = (torch.log_softmax(one, -1) for one in (expected, found))
    kl = torch.nn.functional.kl_div(together, apart, log_target=True, reduction="none").sum(-1)
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return (found - expected).abs().max().item(), kl.mean().item(), same.item()


def _check(told: Merged) -> None:
    rounding = max(torch.finfo(getattr(torch, told.dtype)).eps, 1e-6)
    most = _ROUNDINGS * rounding * told.max_logit
    if not told.max_logit_difference <= most or not math.isfinite(told.mean_kl):
        raise ModelError(
            f"merged, the model says something else: logits differ by {told.max_logit_difference:.3g}, and rounding to "
            f"{told.dtype} explains {most:.3g}; nothing was written"
        )


@contextmanager
def _appearing(out: Path, needed: int) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, and is gone if there is an error."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ConfigError(f"--out {out}: needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free")
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    try:
        yield part
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
