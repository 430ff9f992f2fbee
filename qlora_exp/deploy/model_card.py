"""Write a model card in Markdown: what a recorded run trained, on which data, with which result, and how to load it.

States only what was recorded, and says so where something is unknown. Does not use MLflow.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qlora_exp.config import compatibility
from qlora_exp.config.schema import Config
from qlora_exp.config.validate import from_dict
from qlora_exp.config.values import without_places
from qlora_exp.recipe import summary
from qlora_exp.results import stats
from qlora_exp.results.record import Record, loss_rows
from qlora_exp.utils.display import markdown, markdown_code, pasteable
from qlora_exp.utils.secrets import redact, redacted
from qlora_exp.utils.tables import markdown_table

LICENSES = {
    "embedded:smollm2-135m": "apache-2.0",
    "facebook/opt-125m": "other",
    "Qwen/Qwen2.5-1.5B-Instruct": "apache-2.0",
    "codellama/CodeLlama-34b-hf": "llama2",
    "meta-llama/Llama-2-7b-hf": "llama2",
    "meta-llama/Llama-2-13b-hf": "llama2",
    "meta-llama/Meta-Llama-3-8B": "llama3",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
    "meta-llama/Llama-3.1-70B-Instruct": "llama3.1",
    "meta-llama/Llama-3.2-1B": "llama3.2",
    "meta-llama/Llama-3.2-3B": "llama3.2",
    "embedded:construction_faq": "cc-by-4.0 (attribution: Zaragoza AB)",
    "reasoning_gym": "apache-2.0",
    "tatsu-lab/alpaca": "cc-by-nc-4.0",
    "yahma/alpaca-cleaned": "cc-by-nc-4.0",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
}
"""Licences of the models and datasets that have an option in `conf/`, by the name used there."""
UNKNOWN = "not known here: look it up"
_HUB_NAMES = {"embedded:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def license_of(name: str) -> str:
    """Return the licence of a model or a dataset; `UNKNOWN` if it is not listed here."""
    if name.startswith("random:"):
        return "none: random weights"
    return LICENSES.get(name.partition(":")[0] if name.startswith("reasoning_gym") else name, UNKNOWN)


def write(record: Record, config: Config, source: str) -> str:
    """Return the text of a model's README.md.

    Args:
        record: the recorded run.
        config: the run's recorded config.
        source: argument with which `qlora_exp.load` loads this model.
    """
    config = shared(config)
    model, data = config.model.model_name_or_path, config.dataset.path
    # The hub accepts only its own names in these fields.
    bases, datasets = ([name] if _is_hub_id(name) else [] for name in (_HUB_NAMES.get(model, model), data))
    head = {
        **({"base_model": bases[0]} if bases else {}),
        "library_name": "transformers" if config.method.peft_type is None else "peft",
        "license": license_of(model) if license_of(model) in LICENSES.values() else "other",
        **({"datasets": datasets} if datasets else {}),
        "tags": ["qlora_exp", config.method.name],
    }
    commands = ("chat", source), ("merge", source, "--out", "FOLDER")
    chat, merge = (markdown_code(pasteable(*words)) for words in commands)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {markdown(redact(record.name))}",
        f"{markdown(config.method.name)} fine-tune of {markdown_code(model)}, made by qlora_exp.",
        markdown_table(["", ""], _facts(record, config)),
        "## Results",
        "On the held-out rows, with 95 % confidence intervals over these rows. "
        "This is one run: with another random seed the results would differ too.",
        markdown_table(["", "before", "after", "change"], _results(record)),
        "## Cost",
        markdown_table(["", ""], summary.cost(record.metrics)),
        "## Use",
        f"```python\nimport qlora_exp\n\nmodel, tokenizer = qlora_exp.load({json.dumps(source)})\n```",
        f"{chat} prompts it in the format that it was trained with ({config.dataset.format}); {merge} writes a model "
        "that needs no adapter.",
        "## Licences",
        f"Base model: {license_of(model)}. Data: {license_of(data)}. Both apply to this model.",
    ]
    return redact("\n\n".join(parts)) + "\n"


def shared(config: Config) -> Config:
    """Return a config without secrets and without what is valid on this machine only, to publish it."""
    with compatibility.ignored():  # the run was trained, so what would be refused now worked then
        values = without_places(config.model_dump(mode="json"))
        values["training"]["resume_from_checkpoint"] = None
        return from_dict(redacted(values))


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _facts(record: Record, config: Config) -> list[list[str]]:
    params, training = record.params, config.training
    training_text = f"{record.metrics.get('steps', 0):,.0f} steps of {training.per_device_train_batch_size}"
    training_text += f" x {training.gradient_accumulation_steps} rows, learning rate {training.learning_rate:g}, "
    settings = config.peft_settings
    return [
        ["base model", model_and_revision(config)],
        *([["trained on from", f"the adapter of {_first(record)}"]] if config.model.adapter else []),
        *([["base made by this program", origin]] if (origin := params.get("resolved.base_origin")) else []),
        ["base stored as", f"{config.quantization.name}, {params.get('resolved.dtype', '?')}"],
        ["method", ", ".join([config.method.name, *(f"{key}={value}" for key, value in settings.items())])],
        [
            "data",
            f"{config.dataset.path}, {params.get('data.training_rows', '?')} rows, format {config.dataset.format}",
        ],
        ["held-out rows", params.get("data.evaluation_rows", "?")],
        [
            "training",
            training_text + f"optimizer {params.get('resolved.optim', config.optimizer.optim)}, seed {config.seed}",
        ],
        ["device", params.get("resolved.device_name", "?")],
        ["run", record.run_id],
        ["code", record.tags.get("git.sha", record.tags.get("identity.code", "?"))],
    ]


def _first(record: Record) -> str:
    """Name the adapter that the run trained on from: its run, if that is known, and the SHA-256 of its file."""
    run, digest = (record.params.get(f"resolved.adapter_{name}", "?") for name in ("run", "sha256"))
    return f"run {run}, SHA-256 {digest}"


def model_and_revision(config: Config) -> str:
    """Return the base model's name, with its revision if the config has one."""
    return config.model.model_name_or_path + (f"@{config.model.revision}" if config.model.revision else "")


def _results(record: Record) -> list[list[str]]:
    paths = (f"evaluation/{moment}_losses.jsonl" for moment in ("before", "after"))
    before, after = (_losses(loss_rows(record.text(path), path)) for path in paths)
    rows = []
    if after is not None:
        level = _interval(after, np.stack([np.zeros_like(after[..., 0]), after[..., 1]], -1))
        at_first, change = "-", "-"
        if before is not None and before.shape == after.shape:
            at_first = f"{stats.ratio(before)[0]:.4f}"
            change = _interval(after, before)
        rows.append(["loss", at_first, level, change])
    for key, name, form in summary.QUALITY:
        if key != "loss" and f"after/{key}" in record.metrics:
            values = (record.metrics.get(f"{moment}/{key}", math.nan) for moment in ("before", "after"))
            first, last = ("-" if math.isnan(value) else format(value, form) for value in values)
            rows.append([name, first, last, "-"])
    return rows


def _losses(rows: list[dict[str, float]]) -> Any:
    """Return (1, rows, 2): loss in nats and number of tokens of each row; None if they were not recorded."""
    return np.array([[[row["nll"], row["tokens"]] for row in rows]]) if rows else None


def _interval(ours: Any, theirs: Any) -> str:
    change = stats.difference_of_items(ours, theirs)
    low, high = change.interval
    return f"{change.value:.4f} [{low:.4f}, {high:.4f}]"


def tags(config: Config) -> Sequence[tuple[str, str]]:
    """Return tags by which a registered version can be searched for."""
    config = shared(config)
    return (
        ("base_model", model_and_revision(config)),
        ("method", config.method.name),
        ("quantization", config.quantization.name),
        ("dataset", config.dataset.path),
        ("license.model", license_of(config.model.model_name_or_path)),
        ("license.data", license_of(config.dataset.path)),
    )
