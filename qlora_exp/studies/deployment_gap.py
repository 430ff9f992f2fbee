"""What deployment costs: the same held-out rows scored on a model as it was trained and in each form it may be used in.

Each form is made and measured in a process of its own. Knows nothing of how forms are made (`exporting`) or how quality
is measured (`evaluation`).
"""

import gc
import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.deploy.formats import DEPLOYED, TRAINED
from qlora_exp.results import stats
from qlora_exp.utils import workers
from qlora_exp.utils.errors import ConfigError, UserError

QUALITY = {"loss": True, "rougeL": False, "exact_match": False, "task_score": False}
"""What is compared, and whether less is better."""
_START = "forkserver"


@dataclass(frozen=True)
class Measured:
    """One form on the held-out rows."""

    form: str
    about: str
    """Which weights it has."""
    bytes: int
    """Of all weights, base and adapter, as they are stored."""
    metrics: dict[str, float]
    """Of `evaluation.evaluate`; and `memory_mib`, the peak of generation beyond what a process has before it loads.

    What a GGUF file answers is llama.cpp's own, and is absent where that is not installed.
    """
    losses: list[dict[str, float]]
    samples: list[dict[str, Any]]

    def items(self, metric: str) -> Any:
        """(1, rows, 2): each row's numerator and weight; None if it was not measured."""
        if metric == "loss":
            return np.array([[[row["nll"], row["tokens"]] for row in self.losses]], float)
        found = [[float(sample[metric]), 1.0] for sample in self.samples if metric in sample]
        return np.array([found]) if found else None


@dataclass(frozen=True)
class Gap:
    """How a form differs from the model as it was trained, on the same rows."""

    metric: str
    value: float
    low: float
    high: float
    p: float
    """Adjusted for the number of forms (Holm)."""


def forms_of(config: Config, adapter: bool, names: Sequence[str] = ()) -> list[str]:
    """The forms to measure: those that are named, or all that make sense; the model as it was trained is the first.

    Raises:
        ConfigError: there is no such form, or it makes no sense for this model.
    """
    if unknown := [name for name in names if name not in DEPLOYED]:
        raise ConfigError(f"--forms {unknown[0]}: choose of {', '.join(DEPLOYED)}")
    senseless = {name for name in ("merged", "merged_trained") if not adapter}
    missing = set() if importlib.util.find_spec("gptqmodel") else {"gptq"}
    if not config.quantization.quantized:
        senseless.add("merged_trained")
    if wrong := [name for name in names if name in senseless]:
        raise ConfigError(f"--forms {wrong[0]}: makes no sense for a {'plain base' if adapter else 'whole model'}")
    chosen = names or [name for name in DEPLOYED if name not in senseless | missing]
    return [TRAINED, *(name for name in chosen if name != TRAINED)]


def study(
    source: str, uri: str | None, config: Config, forms: Sequence[str], out: Path, report: Callable[[str], None]
) -> list[Measured]:
    """Make each form under `out`, and measure it.

    Args:
        source: an MLflow run id, a `models:/...` URI, or a folder.
        uri: the MLflow store.
        config: of the run: which rows, and how they are measured.
        forms: of DEPLOYED.
        out: a folder for what is made; what was made of the same source before is measured as it is.
        report: told what is being done.

    Raises:
        UserError: a form cannot be made, or the rows are not here.
    """
    from qlora_exp.deploy import llama_cpp

    multiprocessing.get_context(_START).set_forkserver_preload(["qlora_exp.sweeps.launchers.preload"])
    found = []
    for form in forms:
        where = str(out / form)
        if form != TRAINED:
            report(f"{form}: making it")
            _alone(_make, source, uri, where, form, config)
        report(f"{form}: measuring it")
        given = (source if form == TRAINED else where, uri, config, form)
        found.append(_alone(_measure, *given))
        if DEPLOYED[form].get("form") == "gguf" and config.evaluation.generate_rows and llama_cpp.installed():
            metrics, samples = _alone(_ask_llama_cpp, *given)
            found[-1] = replace(found[-1], metrics=found[-1].metrics | metrics, samples=samples)
    return found


def _alone(work: Callable[..., Any], *given: Any) -> Any:
    try:
        with workers.workers(1, _START) as pool:
            return workers.result(pool.submit(work, *given))
    except BrokenProcessPool as error:
        raise UserError("a process that makes or measures a form was killed, most likely for want of memory") from error


def _make(source: str, uri: str | None, where: str, form: str, config: Config) -> None:
    from qlora_exp.deploy import export, load

    gc.enable()  # the fork server turns it off
    saved = load.find(source, uri, "cpu")
    if not export.is_there(saved, Path(where), **DEPLOYED[form]):
        export.export(saved, Path(where), **DEPLOYED[form], rows_of=config)


def _measure(source: str, uri: str | None, config: Config, form: str) -> Measured:
    from trl.trainer.utils import add_fused_lm_head

    from qlora_exp.data import sources
    from qlora_exp.deploy import export, load
    from qlora_exp.environment.device import detect
    from qlora_exp.environment.memory import MemoryMonitor
    from qlora_exp.models import quantization
    from qlora_exp.training import evaluation

    gc.enable()
    saved = load.find(source, uri, config.device)
    heldout = _heldout(config, saved)
    facts = saved.folder / export.FACTS_FILE
    about = json.loads(facts.read_text("utf-8"))["base"] if facts.is_file() else f"{source}, as it was trained"
    file = saved.folder / load.GGUF_FILE
    asked = _one_at_a_time(config)
    if file.is_file():  # read into common tensors here: what it answers, and what that costs, llama.cpp is asked
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

    from qlora_exp.data import sources
    from qlora_exp.deploy import llama_cpp, load
    from qlora_exp.environment.memory import MemoryMonitor
    from qlora_exp.training import evaluation

    gc.enable()
    saved, asked = load.find(source, uri, "cpu"), _one_at_a_time(config)
    heldout, memory = _heldout(config, saved), MemoryMonitor()
    with memory.phase("generate"):
        context = config.training.max_length + asked.max_new_tokens
        server = llama_cpp.load(saved.folder / load.GGUF_FILE, context, torch.get_num_threads())
        generate = llama_cpp.generator(server, asked.max_new_tokens)
        score = sources.scorer(config.dataset)
        metrics, samples = evaluation.answers(generate, *heldout, asked, score=score, label=f"{form}: ")
    metrics.pop("token_seconds_p95", None)  # it tells each answer's mean only
    return metrics | _memory(memory), samples


def _heldout(config: Config, saved: Any) -> tuple[Any, Any, Any]:
    """The tokenizer, and the held-out rows as text and as tokens."""
    from qlora_exp.data import dataset

    tokenizer = saved.tokenizer()
    rows = dataset.load_rows(config.dataset).heldout
    return tokenizer, *dataset.cut(rows, dataset.tokenize(rows, config, tokenizer), config.training.max_length)


def _one_at_a_time(config: Config) -> EvaluationConfig:
    """As somebody waits for an answer."""
    return config.evaluation.model_copy(update={"generation_batch_size": 1})


def _memory(memory: Any) -> dict[str, float]:
    peaks = memory.peaks.get("generate", {})
    of = "allocated" if "allocated" in peaks else "rss"
    return {"memory_mib": peaks[of] - memory.baseline.get(of, 0.0)} if of in peaks else {}


def gaps(measured: Sequence[Measured]) -> dict[str, list[Gap]]:
    """By form, how each measure of quality differs from that of the first; paired by row."""
    first, *others = measured
    found: dict[str, list[Gap]] = {one.form: [] for one in others}
    for metric in QUALITY:
        theirs = first.items(metric)
        ours = {one.form: one.items(metric) for one in others}
        known = {form: items for form, items in ours.items() if items is not None and theirs is not None}
        differences = {form: stats.difference_of_items(items, theirs) for form, items in known.items()}
        adjusted = stats.holm([one.p for one in differences.values()])
        for (form, one), p in zip(differences.items(), adjusted, strict=True):
            found[form].append(Gap(metric, one.value, one.low, one.high, p))
    return found


def tables(measured: Sequence[Measured]) -> list[tuple[list[str], list[list[str]]]]:
    """Headings and rows, as people read them: loss and cost, then the answers' scores, those that ever differ."""
    changes = {(form, gap.metric): gap for form, found in gaps(measured).items() for gap in found}

    def quality(one: Measured, metric: str) -> list[str]:
        gap = changes.get((one.form, metric))
        value = f"{one.metrics[metric]:.4f}" if metric in one.metrics else "-"
        return [value, "-" if gap is None else f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"]

    def cost(one: Measured) -> list[str]:
        found = [f"{one.bytes / 1e6:,.0f}"]
        for key, shape in (("memory_mib", ",.0f"), ("token_seconds_p50", ".3f")):
            found.append(format(one.metrics[key], shape) if key in one.metrics else "-")
        return found

    scores = [name for name in QUALITY if len({one.metrics.get(name) for one in measured}) > 1 and name != "loss"]
    made = [
        (
            ["form", "loss", "change", "MB", "MiB", "s/token"],
            [[one.form, *quality(one, "loss"), *cost(one)] for one in measured],
        )
    ]
    made += [(["form", name, "change"], [[one.form, *quality(one, name)] for one in measured]) for name in scores]
    return made


def told(measured: Sequence[Measured], source: str) -> dict[str, Any]:
    """Everything, for files."""
    changes = gaps(measured)
    return {
        "source": source,
        "forms": [
            {"form": one.form, "about": one.about, "bytes": one.bytes, "metrics": one.metrics}
            | {"gaps": [asdict(gap) for gap in changes.get(one.form, [])]}
            | {"losses": one.losses, "samples": one.samples}
            for one in measured
        ],
    }
