"""The few lines a run ends with on the terminal."""

from rich.console import Console, Group
from rich.table import Table

from qlora_exp.run import RunResult
from qlora_exp.secrets import redact

# Metric, its name here, its format.
_QUALITY = (
    ("loss", "held-out loss", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("rougeL", "ROUGE-L", ".4f"),
    ("exact_match", "exact match", ".3f"),
    ("task_score", "task score", ".3f"),
    ("token_seconds_p50", "seconds a generation step, p50", ".4f"),
)
_PHASES = ("load", "evaluate_before", "first_step", "steady", "evaluation", "evaluate_after", "save")


def show(result: RunResult, tracking_uri: str | None) -> None:
    """Print quality before and after, cost, and where to look."""
    metrics = result.metrics
    quality = Table("", "before", "after", title="Quality on held-out rows", title_justify="left")
    for key, name, form in _QUALITY:
        if f"after/{key}" in metrics:
            before = metrics.get(f"before/{key}")
            quality.add_row(
                name, "-" if before is None else format(before, form), format(metrics[f"after/{key}"], form)
            )

    cost = Table("", "", title="Cost", title_justify="left", show_header=False)
    cost.add_row(
        "trainable parameters",
        f"{metrics['trainable_parameters']:,} of {metrics['total_parameters']:,} ({metrics['trainable_share']:.3%})",
    )
    if "tokens_per_second" in metrics:
        cost.add_row("tokens/s", f"{metrics['tokens_per_second']:.0f} ({metrics['step_seconds_p50']:.2f} s a step)")
    source = "allocated" if "memory/allocated_peak_mib" in metrics else "rss"
    for phase in _PHASES:
        if (key := f"memory/{phase}/{source}_peak_mib") in metrics:
            cost.add_row(f"peak memory, {phase} ({source})", f"{metrics[key]:,.0f} MiB")
    if (key := f"memory/baseline/{source}_mib") in metrics:
        cost.add_row("memory before loading (imports)", f"{metrics[key]:,.0f} MiB")
    cost.add_row("saved model", f"{metrics['model_bytes'] / 1e6:,.1f} MB")

    console = Console()
    console.print(Group(quality, cost))
    ui = "qlora-exp ui" if tracking_uri is None else f"qlora-exp ui --uri {redact(tracking_uri)}"
    console.print(f"files  {result.output_dir}\nrun    {result.run_id}\nopen   {ui}", highlight=False, soft_wrap=True)
