"""Run tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a model in memory.

Its tasks come from the hub, or from the user's YAML files (`lm_eval_include_path`), which need no network. This module
draws no random numbers of its own, so that measuring does not change training.
"""

import logging
import math
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import ConfigError, DataError, first_line
from qlora_exp.utils.names import valid_names


def load_tasks(config: EvaluationConfig) -> dict[Any, Any]:
    """Load the tasks that the config names, with their data.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        DataError: the data of a task cannot be loaded.
    """
    try:
        import lm_eval.evaluator  # noqa: F401
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise ConfigError("evaluation.lm_eval_tasks needs its package: pip install 'qlora-exp[lm-eval]'") from error
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = config.lm_eval_include_path
    if folder and not Path(folder).is_dir():
        raise ConfigError(f"evaluation.lm_eval_include_path: no folder {folder}; give one with YAML files of tasks")
    # The user's tasks are tried alone first: indexing all tasks of lm-eval takes seconds.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if folder and not {*config.lm_eval_tasks} <= {*manager.all_tasks}:
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in config.lm_eval_tasks if name not in manager.all_tasks]:
        raise ConfigError(
            f"evaluation.lm_eval_tasks: lm-eval has no {', '.join(unknown)}"
            + (
                f" and {folder} has none either; correct the name"
                if folder
                else "; for your own tasks set evaluation.lm_eval_include_path=FOLDER"
            )
        )
    try:
        tasks = get_task_dict(list(config.lm_eval_tasks), manager)
    except (OSError, ValueError) as error:  # from `datasets`: no such data, no network, no such column
        raise DataError(f"evaluation.lm_eval_tasks: {first_line(error)}") from error
    if config.lm_eval_num_fewshot is not None:
        for task in _single(tasks):
            task.set_config("num_fewshot", config.lm_eval_num_fewshot)
    return tasks


def evaluate(
    model: Any, tokenizer: Any, tasks: dict[Any, Any], config: EvaluationConfig, batch_size: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Score `model` on `tasks`, with the same few-shot examples at each call.

    Returns:
        The scores `lm_eval/TASK/METRIC` of each task and group, and details: `items` (for each item its `task`, its
        metrics, and `item`, a digest of its text), `groups` (the tasks of each group) and `lower_is_better` (names of
        scores where lower is better). Names are changed where MLflow does not accept them: `recall@5` -> `recall-5`.
    """
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.models.huggingface import HFLM

    from qlora_exp.models.base import no_stop_strings

    for task in _single(tasks):
        task.set_fewshot_seed(0)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with no_stop_strings(model):  # tasks have their own
        output = run_tasks(wrapped, tasks, limit=config.lm_eval_limit, bootstrap_iters=0, log_samples=True)
    results, all_samples = output["results"], output["samples"]
    task_names = valid_names([*results, *all_samples, *chain.from_iterable(output["group_subtasks"].values())])
    metric_names = valid_names(
        [_name(metric) for values in results.values() for metric in values]
        + [_name(name) for samples in all_samples.values() for sample in samples for name in _of_sample(sample)]
    )
    scores, lower = {}, []
    for task, values in results.items():
        for metric, value in values.items():
            if "," in metric and "_stderr" not in metric and isinstance(value, int | float) and math.isfinite(value):
                name = f"lm_eval/{task_names[task]}/{metric_names[_name(metric)]}"
                scores[name] = float(value)
                if output["higher_is_better"].get(task, {}).get(metric.partition(",")[0]) is False:
                    lower.append(name)
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for task, samples in all_samples.items():
        for sample in samples:  # an item has one sample per filter (lm-eval's ways to extract the answer)
            names = {"task": task_names[task], "item": sample["doc_hash"][:16]}
            item = items.setdefault((task, sample["doc_hash"]), names)
            item |= {metric_names[_name(name)]: value for name, value in _of_sample(sample).items()}
    groups = {
        task_names.get(group, group): [task_names[task] for task in subtasks]
        for group, subtasks in output["group_subtasks"].items()
        if subtasks
    }
    return scores, {"items": [*items.values()], "groups": groups, "lower_is_better": lower}


def fingerprint(items: list[dict[str, Any]]) -> str:
    """Return a digest of which items were scored, in order."""
    return json_digest([(item["task"], item["item"]) for item in items])


def _single(tasks: dict[Any, Any]) -> list[Any]:
    """List the single tasks; groups may contain tasks and groups."""
    return [single for task in tasks.values() for single in (_single(task) if isinstance(task, dict) else [task])]


def _of_sample(sample: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a sample, named METRIC,FILTER as in lm-eval's results."""
    return {
        f"{name},{sample['filter']}": sample[name]
        for name in sample["metrics"]
        if isinstance(sample[name], int | float)
    }


def _name(metric: str) -> str:
    """Convert lm-eval's METRIC,FILTER: `acc,none` -> `acc`; `exact_match,strict` -> `exact_match/strict`."""
    name, _, filter_name = metric.partition(",")
    return name if filter_name == "none" else f"{name}/{filter_name}"
