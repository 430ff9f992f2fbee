"""What a run trained, in the form in which it is to be used: written whole or not at all, read back and compared.

Knows the forms; how an adapter gets into its base is `merging`'s, what a GGUF file holds `gguf_file`'s.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.untrusted import refuse_what_only_users_may_allow
from qlora_exp.deploy import gguf, gptq, merge, ollama
from qlora_exp.deploy.formats import BITSANDBYTES, CALIBRATED, FORMS
from qlora_exp.deploy.load import GGUF_FILE, Saved, load_whole
from qlora_exp.deploy.merge import Base, Whole
from qlora_exp.environment.device import detect, resolve
from qlora_exp.environment.provenance import libraries
from qlora_exp.models.quantization import quantization_config
from qlora_exp.tracking import mlflow_store, run_key
from qlora_exp.tracking.journal import CONFIG_FILE
from qlora_exp.utils.errors import ConfigError, ModelError, TrackingError, first_line
from qlora_exp.utils.files import size_on_disk
from qlora_exp.utils.signals import heeded

log = logging.getLogger(__name__)

FACTS_FILE = "export.json"
_ROUNDINGS = 32
"""How many roundings of the largest logit a model may be off: layers after one another add theirs."""
_KL_OF_ROUNDING = 2.0
"""Nats a token for each unit of rounding (its eps): a sixth of it was seen in bfloat16, three times it without half of
an adapter."""


@dataclass(frozen=True)
class Exported:
    """What was made."""

    folder: str
    form: str
    base: str
    """Which weights the adapter was merged into, and why."""
    weights: str
    """What most of them are stored as."""
    max_logit: float
    max_logit_difference: float
    """Of the model as it was read back, from base and adapter apart, on a paragraph of text."""
    mean_kl: float
    """Nats a token, of its next tokens from theirs."""
    same_first_choice: float
    """Share of tokens after which both find the same next token likeliest."""
    answer: str
    """Greedy, to a question in the format that the run was trained with."""
    same_answer_tokens: int
    """Of it, from the start: as that of base and adapter apart."""
    answer_tokens: int
    bytes: int


def is_there(
    saved: Saved, out: Path, form: str = "merged", dtype: str = "auto", base: Base = "auto", type_: str = "q8_0"
) -> bool:
    """Whether `out` holds what `export` would make.

    Raises:
        ConfigError: it holds something else.
    """
    if not out.exists():
        return False
    facts = out / FACTS_FILE
    if facts.is_file() and _json(facts).get("asked") == _asked(saved, form, dtype, base, type_):
        return True
    raise ConfigError(f"--out {out}: is there already, and holds something else; choose another, or delete it")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _asked(saved: Saved, form: str, dtype: str, base: Base, type_: str) -> dict[str, str]:
    """What tells one export from another: the weights that it is of, and what was asked for."""
    wanted = {"form": form, "dtype": dtype, "base": base} | ({"type": type_} if form == "gguf" else {})
    return {"weights": run_key.weights(saved.folder), **wanted}


def export(
    saved: Saved,
    out: Path,
    form: str = "merged",
    dtype: str = "auto",
    base: Base = "auto",
    type_: str = "q8_0",
    rows_of: Config | None = None,
) -> Exported:
    """Write what a run trained as a folder that needs neither PEFT nor this project, and tell the run in MLflow.

    Args:
        saved: what a run saved, or a whole model that was exported before.
        out: a folder that is not there yet; it appears whole or not at all.
        form: one of FORMS.
        dtype: of the merged weights, before they are quantized: float32, bfloat16, float16; auto: as the base's files.
        base: which weights an adapter is merged into, as `merging.whole` takes it.
        type_: of a GGUF file's weights: one of GGUF_TYPES.
        rows_of: the config whose training rows GPTQ and AWQ are calibrated on; None is the run's own, if it names no
            files that only the user may name.

    Raises:
        ConfigError: there is nothing to merge, it cannot be merged or written so, or there is no room for it.
        ModelError: base and adapter do not belong together, a file is damaged, or what was written says other things.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; choose another, or delete it")
    if form == "merged" and not saved.adapter:
        raise ConfigError(f"{saved.folder}: a full model already, without an adapter to merge")
    write = _writer(saved, form, type_, rows_of)  # what cannot be written is refused before anything is loaded
    asked = _asked(saved, form, dtype, base, type_)
    whole = merge.whole(saved, dtype, base)
    size = sum(tensor.nbytes for tensor in whole.model.state_dict().values())
    # What is quantized is beside what is not for a while, and a file of float32 may be twice its model's.
    with heeded(), _appearing(out, size if form == "merged" else 2 * size) as part:
        stored, exact = write(whole, part)
        whole.tokenizer.save_pretrained(part)
        shutil.copy(saved.folder / CONFIG_FILE, part)
        dtype, whole.model = whole.dtype, None
        back = load_whole(replace(saved, folder=part, adapter=False), "auto")
        made = _compared(whole, back, str(out), form, stored, size_on_disk(part))
        _check(made, dtype, exact)
        facts = asdict(made) | {"asked": asked, "source": saved.source, "libraries": libraries()}
        model = saved.config.model
        facts |= {"model_name_or_path": model.model_name_or_path, "revision": model.revision}
        (part / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        for file in part.iterdir():  # safetensors keeps its files from others
            file.chmod((part / FACTS_FILE).stat().st_mode)
    _tell(saved, facts)
    return made


def _compared(whole: Whole, back: Any, folder: str, form: str, stored: str, size: int) -> Exported:
    """What the model as it was read back says, beside what base and adapter said apart."""
    again = merge.answer(back, whole.tokenizer)
    return Exported(
        folder,
        form,
        whole.base,
        stored,
        whole.expected.abs().max().item(),
        *_distance(merge.logits(back, whole.ids), whole.expected),
        whole.tokenizer.decode(again, skip_special_tokens=True),
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole.answer, again, strict=False))),
        len(again),
        size,
    )


Writer = Callable[[Whole, Path], tuple[str, torch.dtype | None]]
"""Writes into a folder; what the weights are stored as, and the dtype if nothing but rounding was lost."""


def _writer(saved: Saved, form: str, type_: str, rows_of: Config | None) -> Writer:
    if form == "merged":
        return _write_merged
    if form == "gguf":
        gguf.check_type(type_)
        return lambda whole, part: _write_gguf(whole, part, type_, saved)
    if form in BITSANDBYTES:
        return lambda whole, part: _write_bitsandbytes(whole, part, form)
    if form in CALIBRATED:
        gptq.check(form)
        if rows_of is None:
            refuse_what_only_users_may_allow(saved.config, {})
        given = gptq.rows(rows_of or saved.config, saved.tokenizer())
        return lambda whole, part: (gptq.write(whole.model, whole.tokenizer, given, part, form), None)
    raise ConfigError(f"--to {form}: choose one of {', '.join(FORMS)}")


def _write_merged(whole: Whole, part: Path) -> tuple[str, torch.dtype]:
    whole.model.save_pretrained(part, max_shard_size="4GB")
    return whole.dtype, whole.model.dtype


def _write_gguf(whole: Whole, part: Path, type_: str, saved: Saved) -> tuple[str, torch.dtype | None]:
    whole.tokenizer.save_pretrained(part)
    whole.model.config.save_pretrained(part)
    name = saved.config.model.model_name_or_path.rpartition("/")[2]
    exact = gguf.write(whole.model, whole.tokenizer, part, part / GGUF_FILE, type_, name)
    (part / "Modelfile").write_text(ollama.modelfile(whole.tokenizer, GGUF_FILE), "utf-8")
    return type_, exact


def _write_bitsandbytes(whole: Whole, part: Path, form: str) -> tuple[str, None]:
    config = compose(["method=lora", f"quantization={form}"])
    resolved = replace(resolve(config, detect("cpu")), dtype=whole.dtype, compute_dtype=whole.dtype)
    how = quantization_config(config.quantization, resolved)
    with tempfile.TemporaryDirectory(prefix=".merged.", dir=part) as plain:
        whole.model.save_pretrained(plain, max_shard_size="4GB")
        model = type(whole.model).from_pretrained(plain, dtype=whole.model.dtype, quantization_config=how)
        model.save_pretrained(part, max_shard_size="4GB")
    return form, None


def _distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float, float]:
    """Largest difference, mean KL divergence in nats, share of tokens with the same first choice; (tokens, words)."""
    apart, together = (torch.log_softmax(one, -1) for one in (expected, found))
    kl = torch.nn.functional.kl_div(together, apart, log_target=True, reduction="none").sum(-1)
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return (found - expected).abs().max().item(), kl.mean().item(), same.item()


def _check(made: Exported, dtype: str, exact: torch.dtype | None) -> None:
    """Refuse a model that says something else than rounding explains; of quantization only that it is numbers."""
    if not math.isfinite(made.mean_kl) or not math.isfinite(made.max_logit_difference):
        raise ModelError(f"as {made.form}, the model's logits are no numbers any more; nothing was written")
    if exact is None:
        return
    rounding = max(torch.finfo(exact).eps, torch.finfo(getattr(torch, dtype)).eps, 1e-6)
    most, most_kl = _ROUNDINGS * rounding * made.max_logit, _KL_OF_ROUNDING * rounding
    if made.max_logit_difference > most or made.mean_kl > most_kl:
        raise ModelError(
            f"as {made.form}, the model says something else: logits differ by {made.max_logit_difference:.3g} and by "
            f"{made.mean_kl:.3g} nats a token, and rounding to {made.weights} explains {most:.3g} and {most_kl:.3g}; "
            "nothing was written"
        )


@contextmanager
def _appearing(out: Path, needed: int) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, and is gone if there is an error.

    One that was left by a process that was killed goes with the next that writes there.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ConfigError(f"--out {out}: needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free")
    for old in parent.glob(f".{out.name}.*"):
        if old.suffix[1:].isdigit() and not psutil.pid_exists(int(old.suffix[1:])):
            shutil.rmtree(old)
    part = parent / f".{out.name}.{os.getpid()}"
    part.mkdir()
    try:
        yield part
        part.rename(out)
    except SafetensorError as error:  # what it makes of a disk that takes no more
        raise ConfigError(f"--out {out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tell(saved: Saved, facts: dict[str, Any]) -> None:
    """The run in MLflow what was made of it; what was made stays if MLflow does not answer."""
    if saved.run_id is None:
        return
    form = facts["form"] if facts["weights"].startswith(facts["form"]) else f"{facts['form']}-{facts['weights']}"
    try:
        mlflow = mlflow_store.client(saved.tracking_uri)
        mlflow.log_dict(saved.run_id, facts, f"exports/{form}.json")
        mlflow.set_tag(saved.run_id, f"export.{form}", Path(facts["folder"]).name)
    except (MlflowException, TrackingError, OSError) as error:
        log.warning("MLflow was not told of %s: %s", facts["folder"], first_line(error))
