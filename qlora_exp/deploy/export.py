"""Export a trained model in the format in which it will be used, and check the result.

The output folder appears complete or not at all. The exported model is read back and compared with the base model and
its adapter. `merge` merges an adapter into its base model; `gguf` writes GGUF files.
"""

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.untrusted import refuse_user_only_settings
from qlora_exp.config.values import without_places
from qlora_exp.deploy import compressed, gptq, merge, ollama
from qlora_exp.deploy.formats import BITSANDBYTES, COMPRESSED, EXPORT_FORMATS, FINE_TYPES, GPTQ_FORMATS, why_one_base
from qlora_exp.deploy.gguf import write as gguf
from qlora_exp.deploy.gguf.tokenizers import differences
from qlora_exp.deploy.load import Saved, architecture, load_complete_model, remove_places
from qlora_exp.deploy.merge import Base, Whole
from qlora_exp.environment.device import detect, resolve
from qlora_exp.environment.provenance import libraries
from qlora_exp.models import quantization, transformers_4
from qlora_exp.models.files import EXPORT_FILE, GGUF_FILE
from qlora_exp.tracking import mlflow_store, run_key
from qlora_exp.tracking.journal import CONFIG_FILE
from qlora_exp.utils.errors import ConfigError, ModelError, TrackingError, first_line
from qlora_exp.utils.files import scratch_folder, size_on_disk
from qlora_exp.utils.processes.signals import handle_signals

log = logging.getLogger(__name__)

_ROUNDINGS = 32
"""Allowed difference of logits, in roundings of the largest logit: the rounding errors of successive layers add up."""
_KL_OF_ROUNDING = 2.0
"""Allowed KL divergence in nats per token, for each unit of rounding (the dtype's eps). In bfloat16 a sixth of this
limit was measured; without half of an adapter, three times the limit."""
_SLACK = 4.0
"""Allowed difference from the model with weights rounded to the nearest value, in differences that this rounding itself
makes: GPTQ and AWQ choose other values than the nearest."""
_SLACK_OF_INPUTS = 2.0
"""The same for int8, which also rounds what goes into a layer, as the model that it is compared with does: the smallest
difference before a layer can change how a value is rounded, so that two such models differ by as much as each differs
from the exact one. SmolLM2-135M: 0.9 measured."""


@dataclass(frozen=True)
class Exported:
    """Result of an export, and how it compares with the base model and its adapter, before merging."""

    folder: str
    form: str
    base: str
    """Which weights the adapter was merged into, and why."""
    weights: str
    """How most of the exported weights are stored."""
    max_logit: float
    """Largest absolute logit before merging, on a paragraph of text."""
    max_logit_difference: float
    """Largest difference of a logit of the model as read back, on the same paragraph."""
    mean_kl: float
    """Mean KL divergence between the distributions of the next token, in nats per token."""
    same_first_choice: float
    """Share of tokens after which both predict the same most likely next token."""
    answer: str
    """Greedy answer to a fixed question, in the prompt format that the run was trained with."""
    same_answer_tokens: int
    """Number of tokens at the start of the answer that are the same as before merging."""
    answer_tokens: int
    bytes: int
    differences: list[str]
    """Where programs that load the files differ from the model as it was trained: what the format has no place for."""


def is_exported(
    saved: Saved, out: Path, form: str = "merged", dtype: str = "auto", base: Base = "auto", type_: str = "q8_0"
) -> bool:
    """Return whether `out` already contains what `export` would write with these arguments.

    Raises:
        ConfigError: it contains something else.
    """
    if not out.exists():
        return False
    facts = out / EXPORT_FILE
    if facts.is_file() and _json(facts).get("asked") == _asked(saved, form, dtype, base, type_):
        return True
    raise ConfigError(
        f"--out {out}: exists already and contains something else; choose another folder or delete this one"
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    return values if isinstance(values, dict) else {}


def _asked(saved: Saved, form: str, dtype: str, base: Base, type_: str) -> dict[str, str]:
    """Return what distinguishes one export from another: the weights that it was made from, and the options."""
    into = _base_for(saved, form, type_, base)
    wanted = {"form": form, "dtype": dtype, "base": into} | ({"type": type_} if form == "gguf" else {})
    return {"weights": run_key.weights_digest(saved.folder), **wanted}


def export(
    saved: Saved,
    out: Path,
    form: str = "merged",
    dtype: str = "auto",
    base: Base = "auto",
    type_: str = "q8_0",
    rows_of: Config | None = None,
) -> Exported:
    """Write what a run trained as a folder that needs neither PEFT nor this project, and log it to the run in MLflow.

    Args:
        saved: adapter or model that a run saved, or a complete model that was exported before.
        out: folder to write; must not exist. It appears complete or not at all.
        form: export format, one of EXPORT_FORMATS.
        dtype: dtype of the merged weights, before they are quantized: float32, bfloat16, float16; auto: that of the
            base model's files.
        base: which weights an adapter is merged into; see `merge.whole`. auto: for merged, and GGUF in FINE_TYPES,
            those that it was trained on; for all other formats the files': what it changes of weights that were rounded
            before would be lost in the second rounding.
        type_: type of a GGUF file's weights, one of GGUF_TYPES.
        rows_of: config whose training rows GPTQ, AWQ and compressed formats calibrate on. None: the run's own config,
            which is refused if it names files that only the user may name.

    Raises:
        ConfigError: there is nothing to merge, the model cannot be merged or written in this format, or the disk has
            too little space.
        ModelError: base model and adapter do not belong together, a file is damaged, or the exported model's outputs
            differ by more than rounding explains.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; choose another folder or delete it")
    if form == "merged" and not saved.adapter:
        raise ConfigError(f"{saved.folder} is a full model already; there is no adapter to merge")
    write = _writer(saved, form, type_, rows_of)  # refuse what cannot be written before loading anything
    asked = _asked(saved, form, dtype, base, type_)
    log.info("loading the base and the adapter, writing, and reading back: minutes for a large model")
    whole = merge.whole(saved, dtype, _base_for(saved, form, type_, base), _existing(out.absolute()))
    dtype = whole.dtype
    size = sum(tensor.nbytes for tensor in whole.model.state_dict().values())
    # For a while both the quantized and the unquantized files exist, and a float32 file may be twice its model's size.
    with handle_signals(), _appearing(out, size if form == "merged" else 2 * size) as part:
        written = write(whole, part)
        whole.tokenizer.save_pretrained(part)
        transformers_4.add_old_names(part)
        shutil.copy(saved.folder / CONFIG_FILE, part)
        remove_places(part)
        whole.model = None
        reloaded = load_complete_model(replace(saved, folder=part, adapter=False), "auto")
        actual = merge.logits(reloaded, whole.ids)
        made = _compare(whole, reloaded, actual, str(out), form, written, size_on_disk(part))
        _check(made, whole, written, dtype, actual)
        facts = asdict(made) | {"run_id": saved.run_id, "asked": asked, "libraries": libraries()}
        model = saved.config.model
        places = {"model_name_or_path": model.model_name_or_path, "source": saved.source, "folder": made.folder}
        facts |= without_places({"model": places})["model"] | {"revision": model.revision}
        facts["base"] = made.base.replace(model.model_name_or_path, facts["model_name_or_path"])
        (part / EXPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        for file in part.iterdir():  # safetensors makes its files readable by their owner only
            file.chmod((part / EXPORT_FILE).stat().st_mode)
        _log_to_run(saved, facts)  # before the folder appears: if this process is killed, the next one does both
    return made


def _existing(folder: Path) -> Path:
    """Return the nearest folder above that exists."""
    return next(parent for parent in folder.parents if parent.is_dir())


def _base_for(saved: Saved, form: str, type_: str, base: Base) -> Base:
    """Return which weights `auto` means; where there is no choice, it stays as it is."""
    if base != "auto" or not saved.adapter or why_one_base(saved.config):
        return base
    return "trained" if form == "merged" or (form == "gguf" and type_ in FINE_TYPES) else "files"


@dataclass(frozen=True)
class Written:
    """What a writer wrote, and what may differ when it is read back."""

    weights: str
    """How most of the weights are stored."""
    dtype: torch.dtype | None = None
    """Dtype of the stored weights, if nothing but rounding to it was lost."""
    explained: torch.Tensor | None = None
    """If they are quantized: logits of the model with its weights rounded as they are stored, (tokens, vocabulary)."""
    differences: list[str] = field(default_factory=list)
    """What the format has no place for."""
    slack: float = 0.0
    """Further difference that is allowed, in differences of `explained` from the logits before quantization."""


def _compare(
    whole: Whole, reloaded: Any, actual: torch.Tensor, folder: str, form: str, written: Written, size: int
) -> Exported:
    """Compare the outputs of the model as read back with those of the base model and its adapter."""
    answer = merge.answer(reloaded, whole.tokenizer)
    return Exported(
        folder,
        form,
        whole.base,
        written.weights,
        whole.expected.abs().max().item(),
        *_distance(actual, whole.expected),
        whole.tokenizer.decode(answer, skip_special_tokens=True),
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole.answer, answer, strict=False))),
        len(answer),
        size,
        written.differences,
    )


Writer = Callable[[Whole, Path], Written]
"""Writes the model into a folder; it may change the model's weights."""


def _writer(saved: Saved, form: str, type_: str, rows_of: Config | None) -> Writer:
    if form == "merged":
        return _write_merged
    if form == "gguf":
        gguf.check(architecture(saved), saved.tokenizer(), type_)
        return lambda whole, part: _write_gguf(whole, part, type_, saved)
    if form in BITSANDBYTES:
        return lambda whole, part: _write_bitsandbytes(whole, part, form)
    if form in (*GPTQ_FORMATS, *COMPRESSED):
        writer = gptq if form in GPTQ_FORMATS else compressed
        writer.check(form)
        if rows_of is None:
            refuse_user_only_settings(saved.config, {})
        examples = gptq.rows(rows_of or saved.config, saved.tokenizer())
        return lambda whole, part: _write_calibrated(whole, part, form, writer.write, examples)
    raise ConfigError(f"--to {form}: choose one of {', '.join(EXPORT_FORMATS)}")


def _write_merged(whole: Whole, part: Path) -> Written:
    whole.model.save_pretrained(part, max_shard_size="4GB")
    return Written(whole.dtype, whole.model.dtype)


def _write_calibrated(
    whole: Whole, part: Path, form: str, write: Callable[..., str], examples: list[dict[str, list[int]]]
) -> Written:
    weights = write(whole.model, whole.tokenizer, examples, part, form)
    return Written(weights, explained=merge.logits(whole.model, whole.ids), slack=_SLACK)


def _write_gguf(whole: Whole, part: Path, type_: str, saved: Saved) -> Written:
    whole.tokenizer.save_pretrained(part)
    whole.model.config.save_pretrained(part)
    name = saved.config.model.model_name_or_path.rpartition("/")[2]
    exact = gguf.write(whole.model, whole.tokenizer, part / GGUF_FILE, type_, name)
    (part / "Modelfile").write_text(ollama.modelfile(whole.tokenizer, GGUF_FILE), "utf-8")
    differs = differences(whole.tokenizer)
    if exact is not None:
        return Written(type_, exact, differences=differs)
    gguf.round_weights(whole.model, type_)
    return Written(type_, explained=merge.logits(whole.model, whole.ids), differences=differs)


def _write_bitsandbytes(whole: Whole, part: Path, form: str) -> Written:
    config = compose(["method=lora", f"quantization={form}"])
    resolved = replace(resolve(config, detect("cpu")), dtype=whole.dtype, compute_dtype=whole.dtype)
    settings = quantization.quantization_config(config.quantization, resolved)
    with tempfile.TemporaryDirectory(prefix=".merged.", dir=part) as plain:
        whole.model.save_pretrained(plain, max_shard_size="4GB")
        model = type(whole.model).from_pretrained(plain, dtype=whole.model.dtype, quantization_config=settings)
        model.save_pretrained(part, max_shard_size="4GB")
    quantization.round_weights(whole.model, model)
    explained = merge.logits(whole.model, whole.ids)
    return Written(form, explained=explained, slack=_SLACK_OF_INPUTS if form == "int8" else 0.0)


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float, float]:
    """Return largest difference, mean KL divergence in nats, and share of tokens with the same first choice.

    Both arguments are logits, (tokens, vocabulary).
    """
    log_expected, log_actual = (torch.log_softmax(logits, -1) for logits in (expected, actual))
    kl = torch.nn.functional.kl_div(log_actual, log_expected, log_target=True, reduction="none").sum(-1)
    same = (actual.argmax(-1) == expected.argmax(-1)).float().mean()
    return (actual - expected).abs().max().item(), kl.mean().item(), same.item()


def _check(made: Exported, whole: Whole, written: Written, dtype: str, actual: torch.Tensor) -> None:
    """Refuse a model whose outputs differ by more than the rounding of its weights explains.

    Args:
        made: the model as read back.
        whole: what was exported.
        written: how it was stored.
        dtype: dtype in which the model computed before it was written.
        actual: logits of the model as read back.

    Raises:
        ModelError: they do, or are NaN or infinite.
    """
    if not math.isfinite(made.mean_kl) or not math.isfinite(made.max_logit_difference):
        raise ModelError(f"exported as {made.form}, the model has logits that are NaN or infinite; nothing was written")
    computed = getattr(torch, dtype)
    rounding = max(torch.finfo(written.dtype or computed).eps, torch.finfo(computed).eps, 1e-6)
    most, most_kl = _ROUNDINGS * rounding * made.max_logit, _KL_OF_ROUNDING * rounding
    difference, kl = made.max_logit_difference, made.mean_kl
    if written.explained is not None:  # rounded weights explain as much; compare with the model that has them
        lost, lost_kl, _ = _distance(written.explained, whole.expected)
        most, most_kl = most + written.slack * lost, most_kl + written.slack * lost_kl
        difference, kl, _ = _distance(actual, written.explained)
    if difference > most or kl > most_kl:
        model = "the model" if written.explained is None else "the model with its weights so rounded"
        raise ModelError(
            f"exported as {made.form}, the model gives other outputs: logits differ from those of {model} by up to "
            f"{difference:.3g} and by {kl:.3g} nats per token, but storing weights as {made.weights} explains only "
            f"{most:.3g} and {most_kl:.3g}; nothing was written"
        )


@contextmanager
def _appearing(out: Path, needed: int) -> Iterator[Path]:
    """Yield a folder to write into. It becomes `out` at the end, or is removed if there is an error.

    A folder that a killed process left behind is removed by the next export into the same parent folder.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ConfigError(
            f"--out {out}: needs {needed / 1e9:.1f} GB of disk space, but only {free / 1e9:.1f} GB are free"
        )
    with scratch_folder(parent) as scratch:
        part = scratch / out.name
        part.mkdir()
        try:
            yield part
            part.rename(out)
        except SafetensorError as error:  # raised by safetensors when the disk is full
            raise ConfigError(f"--out {out}: cannot be written: {error}") from error


def _log_to_run(saved: Saved, facts: dict[str, Any]) -> None:
    """Log the export to its run in MLflow. If MLflow does not answer, keep the export and warn."""
    if saved.run_id is None:
        return
    form = facts["form"] if facts["weights"].startswith(facts["form"]) else f"{facts['form']}-{facts['weights']}"
    try:
        mlflow = mlflow_store.client(saved.tracking_uri)
        mlflow.log_dict(saved.run_id, facts, f"exports/{form}.json")
        mlflow.set_tag(saved.run_id, f"export.{form}", Path(facts["folder"]).name)
    except (MlflowException, TrackingError, OSError) as error:
        log.warning("the export %s was not logged to MLflow: %s", facts["folder"], first_line(error))
