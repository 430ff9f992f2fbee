"""Summarize a run in two small tables: on the terminal at its end, and at the top of its page in MLflow."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table

from qlora_exp.utils.display import pasteable, say
from qlora_exp.utils.tables import make_table, markdown_table
from qlora_exp.utils.units import MIB

if TYPE_CHECKING:
    from qlora_exp.recipe.result import RunResult

QUALITY = (
    ("loss", "held-out loss", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("rougeL", "ROUGE-L", ".4f"),
    ("exact_match", "exact match", ".3f"),
    ("task_score", "task score", ".3f"),
    ("unrelated_loss", "loss on unrelated text", ".4f"),
    ("token_seconds_p50", "seconds a generation step, p50", ".4f"),
    ("generated_tokens_per_second", "generated tokens/s", ".1f"),
)
"""Metric, its name in the tables, its number format."""
SCORES = {"source_loss/": ".4f", "metric/": ".4g", "lm_eval/": ".3f"}
"""Beginnings of the names of metrics of which a run may have any number, and their number formats."""
_PHASES = ("load", "initialize", "first_step", "steady", "evaluation", "evaluate_after", "generate_after", "save")


def _quality(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """List the rows of the table of quality: name of the metric, value before training, value after it."""
    rows = []
    for key, name, spec in QUALITY:
        if f"after/{key}" in metrics:
            before = metrics.get(f"before/{key}")
            rows.append((name, "-" if before is None else format(before, spec), format(metrics[f"after/{key}"], spec)))
    return [*rows, *(row for group in SCORES for row in scores(metrics, group))]


def names_of_scores(metrics: Iterable[str]) -> dict[str, str]:
    """Return those of these names that are scores after training, in the order of `SCORES`, and their formats."""
    names = sorted({*metrics})
    return {name: spec for group, spec in SCORES.items() for name in names if name.startswith(f"after/{group}")}


def scores(metrics: Mapping[str, float], group: str) -> list[tuple[str, str, str]]:
    """List name, value before training and value after it of each metric of a group of `SCORES`."""
    rows, spec = [], SCORES[group]
    names = {name for key in metrics if (name := key.partition("/")[2]).startswith(group)}
    for name in sorted(names):  # a metric of a package may have failed at one of the two moments
        values = (metrics.get(f"{moment}/{name}") for moment in ("before", "after"))
        before, after = ("-" if value is None else format(value, spec) for value in values)
        shown = name.removeprefix("lm_eval/").replace("source_loss/", "held-out loss of ")
        rows.append((shown, before, after))
    return rows


def cost(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """List what the run cost (parameters, speed, energy, memory, size on disk) as names and formatted values."""
    rows = [
        (
            "trainable parameters",
            f"{metrics['trainable_parameters']:,.0f} of {metrics['total_parameters']:,.0f} "
            f"({metrics['trainable_share']:.3%})",
        )
    ]
    if "quantized_share" in metrics:
        rows.append(("weights in few bits", f"{metrics['quantized_share']:.1%} of the layers'"))
    if "final_train_loss" in metrics:
        means = f"{metrics['final_train_loss']:.4f} at the end, {metrics['train_loss']:.4f} on average"
        rows.append(("training loss", means))
    if "step_seconds_mean" in metrics:
        seconds = metrics["step_seconds_mean"] * metrics["steps"]
        rows.append(("training time", f"{_duration(seconds)}, {metrics['steps']:,.0f} steps"))
    if "run_seconds" in metrics:
        rows.append(("total time", _duration(metrics["run_seconds"])))
    if "tokens_per_second" in metrics:
        rows.append(("tokens/s", f"{metrics['tokens_per_second']:.0f} ({metrics['step_seconds_p50']:.2f} s a step)"))
    if "optimizer_state_bytes" in metrics:
        rows.append(("optimizer states", f"{metrics['optimizer_state_bytes'] / MIB:,.1f} MiB"))
    if "mfu" in metrics:
        done, peak = (metrics[f"{which}_per_second"] / 1e9 for which in ("flops", "peak_flops"))
        rows.append(("arithmetic", f"{done:,.0f} of {peak:,.0f} GFLOP/s ({metrics['mfu']:.1%})"))
    if "tokens_per_gb_second" in metrics:
        rows.append(("tokens per GB and second", f"{metrics['tokens_per_gb_second']:.1f}"))
    if "energy_joules" in metrics:
        rows.append(("energy", f"{metrics['energy_joules']:,.0f} J"))
    source = "allocated" if "memory/allocated_peak_mib" in metrics else "rss"
    for phase in _PHASES:
        if (key := f"memory/{phase}/{source}_peak_mib") in metrics:
            rows.append((f"peak memory, {phase} ({source})", f"{metrics[key]:,.0f} MiB"))
    if (key := f"memory/baseline/{source}_mib") in metrics:
        rows.append(("memory before loading (imports)", f"{metrics[key]:,.0f} MiB"))
    if "plan/memory_ratio" in metrics:
        planned, times = metrics["plan/peak_mib"], metrics["plan/memory_ratio"]
        took = (
            f"; measured: {times:.2f} times that"
            if source == "allocated"
            else f" of tensors, beside the imports; measured beside them: {times:.2f} times that"
        )
        rows.append(("planned memory", f"{planned:,.0f} MiB{took}"))
    return [*rows, ("saved model", f"{metrics['model_bytes'] / 1e6:,.1f} MB")]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:,.1f} min"


def markdown(metrics: Mapping[str, float]) -> str:
    """Format quality and cost as two Markdown tables."""
    quality = markdown_table(["on held-out rows", "before", "after"], _quality(metrics))
    return f"{quality}\n\n{markdown_table(['cost', ''], cost(metrics))}\n"


def show(result: "RunResult", tracking_uri: str | None) -> None:
    """Print quality before and after training, cost, and where to find the files and the MLflow run."""
    quality = make_table(["", "before", "after"], _quality(result.metrics), "Quality on held-out rows")
    costs = Table("", "", title="Cost", title_justify="left", show_header=False)
    for row in cost(result.metrics):
        costs.add_row(*row)
    Console(markup=False).print(Group(quality, costs))
    ui = pasteable("ui", uri=tracking_uri)
    say(f"files  {result.output_dir}", f"run    {result.run_id}", f"open   {ui}")
