"""Write a model card in Markdown: what a recorded run trained, on which data, with which result, and how to load it.

States only what was recorded, and says so where something is unknown. Does not use MLflow.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import REASONING_GYM
from qlora_exp.config.tables import compatibility
from qlora_exp.config.validate import from_dict
from qlora_exp.config.values import without_places
from qlora_exp.recipe import summary
from qlora_exp.results import stats
from qlora_exp.results.record import Record, loss_rows
from qlora_exp.utils.display import markdown, markdown_code, pasteable, visible
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
    "allenai/OLMo-2-0425-1B": "apache-2.0",
    "allenai/OLMo-2-1124-7B": "apache-2.0",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "mit",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "mit",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "mit",
    "google/gemma-3-1b-pt": "gemma",
    "google/gemma-3-270m": "gemma",
    "HuggingFaceTB/SmolLM2-1.7B": "apache-2.0",
    "HuggingFaceTB/SmolLM3-3B-Base": "apache-2.0",
    "meta-llama/Llama-3.1-8B": "llama3.1",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3.1",
    "microsoft/phi-4": "mit",
    "microsoft/Phi-4-mini-instruct": "mit",
    "mistralai/Ministral-8B-Instruct-2410": "other",
    "mistralai/Mistral-7B-v0.3": "apache-2.0",
    "mistralai/Mistral-Nemo-Base-2407": "apache-2.0",
    "mistralai/Mistral-Small-24B-Base-2501": "apache-2.0",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "Qwen/Qwen3-0.6B": "apache-2.0",
    "Qwen/Qwen3-1.7B": "apache-2.0",
    "Qwen/Qwen3-14B": "apache-2.0",
    "Qwen/Qwen3-30B-A3B": "apache-2.0",
    "Qwen/Qwen3-32B": "apache-2.0",
    "Qwen/Qwen3-4B": "apache-2.0",
    "Qwen/Qwen3-8B": "apache-2.0",
    "unsloth/gpt-oss-20b-BF16": "apache-2.0",
    "embedded:construction_faq": "cc-by-4.0 (attribution: Zaragoza AB)",
    "reasoning_gym": "apache-2.0",
    "tatsu-lab/alpaca": "cc-by-nc-4.0",
    "yahma/alpaca-cleaned": "cc-by-nc-4.0",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
}
"""Licences of the models and datasets that have an option in `conf/`, by the name used there."""
UNKNOWN = "not known here: look it up"
_HELD_OUT = ("loss", "perplexity", "rougeL", "exact_match")
"""Metrics of the held-out rows in the metadata."""
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
    config = shared(config, record.tags)
    model = config.model.model_name_or_path
    commands = ("chat", source), ("merge", source, "--out", "FOLDER")
    chat, merge = (markdown_code(pasteable(*words)) for words in commands)
    parts = [
        f"# {markdown(redact(record.name))}",
        f"{markdown(config.method.name)} fine-tune of {markdown_code(_name(model))}{_local(model, 'folder')}, "
        "made by qlora_exp.",
        markdown_table(["", ""], _facts(record, config)),
        "## Results",
        "On the held-out rows, with 95 % confidence intervals over these rows. "
        "This is one run: with another random seed the results would differ too.",
        markdown_table(["", "before", "after", "change"], _results(record)),
        "## Cost",
        markdown_table(["", ""], summary.cost(record.metrics)),
        "## Use",
        f"```python\nimport qlora_exp\n\nmodel, tokenizer = qlora_exp.load({json.dumps(source)})\n```",
        "A folder with these files, such as a download from the hub, is loaded by its name: "
        f'`qlora_exp.load("FOLDER")`.{_base_to_provide(config)}',
        f"{chat} prompts it in the format that it was trained with ({config.dataset.format}); {merge} writes a model "
        "that needs no adapter. MLflow loads and serves it, where qlora_exp is installed: "
        f"{markdown_code(f'mlflow.pyfunc.load_model({json.dumps(source)})')}.",
        "## Licences",
        f"Base model: {license_of(model)}. Data: {_data_license(config)}. Both apply to this model.",
    ]
    text = redact("\n\n".join(parts))
    return str(ModelCard(f"---\n{_metadata(record, config).to_yaml()}\n---\n\n{text}\n"))


def _metadata(record: Record, config: Config) -> ModelCardData:
    """Return the card's metadata. The hub accepts only its own names for models, datasets and licences."""
    model, names = config.model.model_name_or_path, _datasets(config)
    on_hub = [name for name in names if _is_hub_id(name)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=names[0] if names == on_hub[:1] else "other",
            dataset_name=visible(", ".join(map(_name, names))),
            metric_type=key,
            metric_name=name,
            metric_value=value,
        )
        for key, name, _ in summary.QUALITY
        if key in _HELD_OUT and math.isfinite(value := record.metrics.get(f"after/{key}", math.nan))
    ]
    return ModelCardData(
        base_model=_HUB_NAMES.get(model, model if _is_hub_id(model) else None),
        library_name="transformers" if config.method.peft_type is None else "peft",
        pipeline_tag="text-generation",
        license=license_of(model) if license_of(model) in LICENSES.values() else "other",
        datasets=on_hub or None,
        tags=["qlora_exp", visible(config.method.name)],
        model_name=visible(redact(record.name)) if results else None,
        eval_results=results or None,
    )


def _datasets(config: Config) -> list[str]:
    """Return the paths of the rows that were trained on, each once."""
    return list(dict.fromkeys(part.path for part in config.parts.values()))


def _data_license(config: Config) -> str:
    licenses = {path: license_of(path) for path in _datasets(config)}
    return "; ".join(
        f"{_name(path)}: {license}" if len(licenses) > 1 else license for path, license in licenses.items()
    )


def shared(config: Config, tags: Mapping[str, str]) -> Config:
    """Return a config without secrets and without what is valid on this machine only, to publish it.

    Args:
        config: the recorded config of a run.
        tags: tags of the run.
    """
    with compatibility.ignored():  # the run was trained, so what would be refused now worked then
        values = without_places(config.model_dump(mode="json"), local_paths(config, tags))
        values["training"]["resume_from_checkpoint"] = None
        values["model"]["adapter"] = None
        return from_dict(redacted(values))


def local_paths(config: Config, tags: Mapping[str, str]) -> set[str]:
    """Return the files and folders in a run's config: its base model, datasets and tasks that are not on the hub.

    `bases/mine` may be either. The versions in the run's tags say which it was: commits, or digests of files.
    """
    paths = [path for dataset in config.datasets for path in dataset.paths]
    versions = tags.get("identity.data", "").split("+")
    versions = versions if len(versions) >= len(paths) else [""] * len(paths)
    sources = [(config.model.model_name_or_path, tags.get("identity.model", "")), *zip(paths, versions, strict=False)]
    tokenizer, tasks = config.peft_settings.get("tokenizer_name_or_path"), config.evaluation.lm_eval_include_path
    sources += [(str(tokenizer), "")] if tokenizer else []
    return {path for path, version in sources if _is_local(path, version)} | ({tasks} if tasks else set())


def _is_local(name: str, version: str) -> bool:
    if name.startswith(("embedded:", "random:", REASONING_GYM)):
        return False
    if version:
        return bool(re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{64}|missing", version))
    return not re.fullmatch(rf"{_HUB_ID}/{_HUB_ID}", name) or Path(name).exists()


_HUB_ID = r"[\w-][\w.-]*"


def _is_hub_id(name: str) -> bool:
    """Return whether a name in a shared config is one of the hub: what is local has a path there."""
    return bool(re.fullmatch(rf"{_HUB_ID}(/{_HUB_ID})?", name))


def _name(source: str) -> str:
    """Return the name to show for a base or a dataset in a shared config."""
    return source.removeprefix("./") or "unnamed"


def _local(source: str, kind: str) -> str:
    return f", a local {kind}" if source.startswith("./") else ""


def _base_to_provide(config: Config) -> str:
    """Say how to load an adapter whose base was a local folder."""
    base = config.model.model_name_or_path
    if config.method.peft_type is None or not base.startswith("./"):
        return ""
    return (
        f" Its base model was a local folder: put that folder, or a link to it, as {markdown_code(base)} into the "
        "folder where you load the adapter. Another version of the base model is refused."
    )


def _facts(record: Record, config: Config) -> list[list[str]]:
    params, training = record.params, config.training
    training_text = f"{record.metrics.get('steps', 0):,.0f} steps of {training.per_device_train_batch_size}"
    training_text += f" x {training.gradient_accumulation_steps} rows, learning rate {training.learning_rate:g}, "
    settings = config.method.parts | config.peft_settings
    data = ", ".join(f"{_name(path)}{_local(path, 'file')}" for path in _datasets(config))
    rows = params.get("data.training_rows", "?")
    return [
        ["base model", _name(model_and_revision(config)) + _local(config.model.model_name_or_path, "folder")],
        ["base stored as", f"{config.quantization.name}, {params.get('resolved.dtype', '?')}"],
        ["method", ", ".join([config.method.name, *(f"{key}={value}" for key, value in settings.items())])],
        ["data", f"{data}, {rows} rows, format {config.dataset.format}"],
        ["held-out rows", params.get("data.evaluation_rows", "?")],
        [
            "training",
            training_text + f"optimizer {params.get('resolved.optim', config.optimizer.optim)}, seed {config.seed}",
        ],
        ["device", params.get("resolved.device_name", "?")],
        *([["trained on from", f"the adapter of {_first(record)}"]] if "resolved.adapter_sha256" in params else []),
        *([["base made by this program", made[1]]] if (made := re.match(_MADE, params.get(_ORIGIN, ""))) else []),
        ["run", record.run_id],
        ["code", record.tags.get("git.sha", record.tags.get("identity.code", "?"))],
    ]


_ORIGIN = "resolved.base_origin"
_MADE = r"(.*(?:run \w+|unknown run))\b"
"""The parameter `resolved.base_origin` up to the run that made the base, without the base's folder."""


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
    sources = {name.removeprefix("after/") for name in record.metrics if name.startswith("after/source_loss/")}
    of_sources = [(key, f"loss, {markdown(key.partition('/')[2])}", ".4f") for key in sorted(sources)]
    for key, name, form in (*of_sources, *summary.QUALITY):
        if key != "loss" and f"after/{key}" in record.metrics:
            values = (record.metrics.get(f"{moment}/{key}", math.nan) for moment in ("before", "after"))
            first, last = ("-" if math.isnan(value) else format(value, form) for value in values)
            rows.append([name, first, last, "-"])
    return [*rows, *([*values, "-"] for values in summary.scores(record.metrics, "metric/"))]


def _losses(rows: list[dict[str, float]]) -> Any:
    """Return (1, rows, 2): loss in nats and number of tokens of each row; None if they were not recorded."""
    return np.array([[[row["nll"], row["tokens"]] for row in rows]]) if rows else None


def _interval(ours: Any, theirs: Any) -> str:
    change = stats.difference_of_items(ours, theirs)
    low, high = change.interval
    return f"{change.value:.4f} [{low:.4f}, {high:.4f}]"


def tags(config: Config, recorded: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """Return tags by which a registered version can be searched for.

    Args:
        config: the recorded config of a run.
        recorded: tags of the run.
    """
    config = shared(config, recorded)
    return (
        ("base_model", model_and_revision(config)),
        ("method", config.method.name),
        ("quantization", config.quantization.name),
        ("dataset", ", ".join(_datasets(config))),
        ("license.model", license_of(config.model.model_name_or_path)),
        ("license.data", _data_license(config)),
    )
