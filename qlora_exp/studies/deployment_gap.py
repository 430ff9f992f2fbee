"""Measure what deployment costs: score the same held-out rows on the model as trained and in each export format.

Each format is exported and measured in a separate process. `deploy.export` exports, and `training.evaluation` measures
quality.
"""

import gc
import importlib.util
import json
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.deploy import llama_cpp
from qlora_exp.deploy.formats import DEPLOYED, TRAINED, why_one_base
from qlora_exp.deploy.gguf.families import check_family
from qlora_exp.models.files import EXPORT_FILE, GGUF_FILE
from qlora_exp.results import stats
from qlora_exp.utils.errors import ConfigError, UserError, first_line
from qlora_exp.utils.processes import workers

log = logging.getLogger(__name__)

QUALITY = ("loss", "rougeL", "exact_match", "task_score")
"""Metrics that are compared."""
_START = "forkserver"


@dataclass(frozen=True)
class Measured:
    """Results of one export format on the held-out rows."""

    form: str
    about: str
    """Description of the weights it contains."""
    bytes: int
    """Stored size of all weights, base and adapter."""
    metrics: dict[str, float]
    """Metrics of `evaluation.evaluate`, and `memory_mib`: peak memory of generation minus the memory before loading.

    Answers of a GGUF file come from llama.cpp; their metrics are absent if it is not installed.
    """
    losses: list[dict[str, float]]
    samples: list[dict[str, Any]]

    def items(self, metric: str) -> Any:
        """Return each row's numerator and weight of a metric, shape (1, rows, 2); None if it was not measured."""
        if metric == "loss":
            return np.array([[[row["nll"], row["tokens"]] for row in self.losses]], float)
        scores = [[float(sample[metric]), 1.0] for sample in self.samples if metric in sample]
        return np.array([scores]) if scores else None


@dataclass(frozen=True)
class Gap:
    """Difference between an export format and the model as trained, on the same rows."""

    metric: str
    value: float
    low: float
    high: float
    p: float
    """p-value, adjusted for the number of formats (Holm)."""


def formats_of(config: Config, adapter: bool, family: str, names: Sequence[str] = ()) -> list[str]:
    """Return the export formats to measure: the named ones, or all that apply. The model as trained comes first.

    Args:
        config: config of the run.
        adapter: whether the run trained an adapter.
        family: type (`model_type`) of the model.
        names: formats that the user named; empty for all that apply. Those left out are logged.

    Raises:
        ConfigError: there is no such format, or it does not apply to this model.
    """
    if unknown := [name for name in names if name not in DEPLOYED]:
        raise ConfigError(f"--forms {unknown[0]}: no such format; choose from {', '.join(DEPLOYED)}")
    inapplicable = {name for name in ("merged", "merged_files") if not adapter}
    packages = {"gptq": "gptqmodel", "w4a16": "llmcompressor"}
    missing = {
        name: f"{package} is not installed"
        for name, package in packages.items()
        if not importlib.util.find_spec(package)
    }
    written = [name for name, arguments in DEPLOYED.items() if arguments.get("form") == "gguf"]
    try:
        check_family(family)
    except ConfigError as error:
        if wrong := [name for name in names if name in written]:
            raise ConfigError(f"--forms {wrong[0]}: {error}") from error
        missing |= dict.fromkeys(written, str(error).removeprefix("--to gguf: ").split(" (")[0])
    if why_one_base(config):
        inapplicable.add("merged_files")
    if wrong := [name for name in names if name in inapplicable]:
        model = "this adapter and its base" if adapter else "a model without an adapter"
        raise ConfigError(f"--forms {wrong[0]}: does not apply to {model}; leave it out")
    if missing and not names:
        log.warning("not measured: %s", "; ".join(f"{name} ({why})" for name, why in missing.items()))
    chosen = names or [name for name in DEPLOYED if name not in inapplicable | missing.keys()]
    return [TRAINED, *(name for name in chosen if name != TRAINED)]


def study(
    source: str, uri: str | None, config: Config, forms: Sequence[str], out: Path, report: Callable[[str], None]
) -> tuple[list[Measured], dict[str, str]]:
    """Export each format to a folder under `out`, and measure it.

    Args:
        source: an MLflow run id, a `models:/...` URI, or a folder.
        uri: URI of the MLflow store.
        config: config of the run; it determines the held-out rows and how they are measured.
        forms: names of formats in DEPLOYED.
        out: folder for the exports. An existing export of the same source is measured without exporting again.
        report: called with a progress message before each piece of work.

    Returns:
        The results, the model as trained first, and for each format that could not be exported or measured, why.

    Raises:
        UserError: the model as trained cannot be measured.
    """
    multiprocessing.get_context(_START).set_forkserver_preload(["qlora_exp.recipe.preload"])
    measured, failed = list[Measured](), dict[str, str]()
    for form in forms:
        try:
            measured.append(_measured(source, uri, config, form, out, report))
        except Exception as error:  # hours may have gone into the others
            if form == TRAINED:
                raise
            failed[form] = first_line(error)
            if not isinstance(error, UserError):
                log.exception("%s failed", form)
    return measured, failed


def _measured(
    source: str, uri: str | None, config: Config, form: str, out: Path, report: Callable[[str], None]
) -> Measured:
    where = str(out / form)
    if form != TRAINED:
        report(f"{form}: exporting")
        _in_own_process(_make, source, uri, where, form, config)
    report(f"{form}: measuring")
    arguments = (source if form == TRAINED else where, uri, config, form)
    result: Measured = _in_own_process(_measure, *arguments)
    if DEPLOYED[form].get("form") == "gguf" and config.evaluation.generate_rows and llama_cpp.installed():
        metrics, samples = _in_own_process(_ask_llama_cpp, *arguments)
        return replace(result, metrics=result.metrics | metrics, samples=samples)
    return result


def _in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        with workers.workers(1, _START) as pool:
            return workers.result(pool.submit(work, *arguments))
    except BrokenProcessPool as error:
        raise UserError("the process that exports or measures a format was killed, probably out of memory") from error


def _make(source: str, uri: str | None, where: str, form: str, config: Config) -> None:
    from qlora_exp.deploy import export, load

    gc.enable()  # the fork server turns the garbage collector off
    saved = load.find(source, uri, "cpu")
    if not export.is_exported(saved, Path(where), **DEPLOYED[form]):
        export.export(saved, Path(where), **DEPLOYED[form], rows_of=config)


def _measure(source: str, uri: str | None, config: Config, form: str) -> Measured:
    from trl.trainer.utils import add_fused_lm_head

    from qlora_exp.data.reading import sources
    from qlora_exp.deploy import load
    from qlora_exp.environment.device import detect
    from qlora_exp.environment.memory import MemoryMonitor
    from qlora_exp.models import quantization
    from qlora_exp.training import evaluation

    gc.enable()
    saved = load.find(source, uri, config.device)
    heldout = _heldout(config, saved)
    facts = saved.folder / EXPORT_FILE
    about = json.loads(facts.read_text("utf-8"))["base"] if facts.is_file() else f"{source}, as trained"
    file = saved.folder / GGUF_FILE
    asked = _one_at_a_time(config)
    if file.is_file():  # transformers measures only its loss; llama.cpp measures its answers and their cost
        asked = asked.model_copy(update={"generate_rows": 0})
    memory = MemoryMonitor(detect(config.device, bitsandbytes=config.quantization.bitsandbytes).type)
    model = load.load_saved(saved)
    add_fused_lm_head(model.get_base_model() if saved.adapter else model, outputs=("log_probs",))
    measured = evaluation.evaluate(
        model,
        *heldout,
        asked,
        batch_size=config.training.per_device_eval_batch_size,
        score=sources.scorer(config.dataset),
        label=f"{form}: ",
        generating=memory.phase("generate"),
    )
    size = file.stat().st_size if file.is_file() else quantization.weights_bytes(model)
    return Measured(form, about, size, measured.metrics | _memory(memory), measured.losses, measured.samples)


def _ask_llama_cpp(source: str, uri: str | None, config: Config, form: str) -> tuple[dict[str, float], list[Any]]:
    import torch

    from qlora_exp.data.end_of_turn import end_of_turn
    from qlora_exp.data.prompts import chat_template
    from qlora_exp.data.reading import sources
    from qlora_exp.deploy import load
    from qlora_exp.environment.memory import MemoryMonitor
    from qlora_exp.training import evaluation

    gc.enable()
    saved, asked = load.find(source, uri, "cpu"), _one_at_a_time(config)
    heldout, memory = _heldout(config, saved), MemoryMonitor()
    with memory.phase("generate"):
        context = config.training.max_length + asked.max_new_tokens
        server = llama_cpp.load(saved.folder / GGUF_FILE, context, torch.get_num_threads())
        end = end_of_turn(heldout[0], chat_template(saved.config.dataset, heldout[0]))
        generate = llama_cpp.generator(server, asked.max_new_tokens, [end.stop] if end.stop else [])
        score = sources.scorer(config.dataset)
        metrics, samples = evaluation.answers(generate, *heldout, asked, score=score, label=f"{form}: ")
    metrics.pop("token_seconds_p95", None)  # llama.cpp reports only the mean time per token of each answer
    return metrics | _memory(memory), samples


def _heldout(config: Config, saved: Any) -> tuple[Any, Any, Any]:
    """Return the tokenizer, and the held-out rows as text and as tokens."""
    from qlora_exp.data import tokenization
    from qlora_exp.data.rows import load_rows

    tokenizer = saved.tokenizer()
    rows = load_rows(config.dataset, config.unrelated).heldout
    return tokenizer, *tokenization.cut(
        rows, tokenization.tokenize(rows, config, tokenizer), config.training.max_length
    )


def _one_at_a_time(config: Config) -> EvaluationConfig:
    """Return the evaluation config with a batch of one, as in interactive use."""
    return config.evaluation.model_copy(update={"generation_batch_size": 1})


def _memory(memory: Any) -> dict[str, float]:
    peaks = memory.peaks.get("generate", {})
    kind = "allocated" if "allocated" in peaks else "rss"
    return {"memory_mib": peaks[kind] - memory.baseline.get(kind, 0.0)} if kind in peaks else {}


def _compared(measured: Sequence[Measured]) -> list[str]:
    """List the metrics that are compared: those of this package, and those of installed packages."""
    names = {name for item in measured for name in item.metrics if name.startswith("metric/")}
    return [*QUALITY, *sorted(names)]


def gaps(measured: Sequence[Measured]) -> dict[str, list[Gap]]:
    """Compute for each format how its metrics differ from those of the first one, paired by row."""
    trained, *exported = measured
    by_form: dict[str, list[Gap]] = {result.form: [] for result in exported}
    for metric in _compared(measured):
        reference = trained.items(metric)
        scored = {result.form: result.items(metric) for result in exported}
        pairs = {form: items for form, items in scored.items() if items is not None and reference is not None}
        differences = {form: stats.difference_of_items(items, reference) for form, items in pairs.items()}
        adjusted = stats.holm([difference.p for difference in differences.values()])
        for (form, difference), p in zip(differences.items(), adjusted, strict=True):
            by_form[form].append(Gap(metric, difference.value, *difference.interval, p))
    return by_form


def tables(measured: Sequence[Measured]) -> list[tuple[list[str], list[list[str]]]]:
    """Return headings and rows as text: loss and cost first, then a table for each score that differs."""
    changes = {(form, gap.metric): gap for form, own in gaps(measured).items() for gap in own}

    def quality(item: Measured, metric: str) -> list[str]:
        gap = changes.get((item.form, metric))
        value = f"{item.metrics[metric]:.4f}" if metric in item.metrics else "-"
        return [value, "-" if gap is None else f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"]

    def cost(item: Measured) -> list[str]:
        cells = [f"{item.bytes / 1e6:,.0f}"]
        for key, shape in (("memory_mib", ",.0f"), ("token_seconds_p50", ".3f")):
            cells.append(format(item.metrics[key], shape) if key in item.metrics else "-")
        return cells

    scores = [
        name
        for name in _compared(measured)
        if len({item.metrics.get(name) for item in measured}) > 1 and name != "loss"
    ]
    result = [
        (
            ["format", "loss", "change", "MB", "MiB", "s/token"],
            [[item.form, *quality(item, "loss"), *cost(item)] for item in measured],
        )
    ]
    result += [
        (["format", name, "change"], [[item.form, *quality(item, name)] for item in measured]) for name in scores
    ]
    return result


def as_json(measured: Sequence[Measured], failed: dict[str, str], source: str) -> dict[str, Any]:
    """Return all results as JSON values, and why the formats that failed did."""
    changes = gaps(measured)
    return {
        "source": source,
        "forms": [
            {"form": item.form, "about": item.about, "bytes": item.bytes, "metrics": item.metrics}
            | {"gaps": [asdict(gap) for gap in changes.get(item.form, [])]}
            | {"losses": item.losses, "samples": item.samples}
            for item in measured
        ],
        "failed": failed,
    }
