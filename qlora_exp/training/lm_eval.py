"""Tasks of lm-eval-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a model in memory.

Its tasks come from the hub, or from YAML files of one's own (`lm_eval_include_path`), which need no network. Knows
nothing of runs. Draws no random numbers of its own, so that measuring does not change training.
"""

import logging
import math
from pathlib import Path
from typing import Any

from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import ConfigError, DataError, first_line


def load_tasks(config: EvaluationConfig) -> dict[Any, Any]:
    """The tasks that the config names, with their data.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        DataError: a task's data cannot be had.
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
        raise ConfigError(f"evaluation.lm_eval_include_path: no folder {folder}")
    # Those of one's own first: to know all of lm-eval's takes seconds.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if folder and not {*config.lm_eval_tasks} <= {*manager.all_tasks}:
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in config.lm_eval_tasks if name not in manager.all_tasks]:
        raise ConfigError(
            f"evaluation.lm_eval_tasks: lm-eval has no {', '.join(unknown)}"
            + (f" and {folder} neither" if folder else "; tasks of your own: evaluation.lm_eval_include_path=FOLDER")
        )
    try:
        tasks = get_task_dict(list(config.lm_eval_tasks), manager)
    except (OSError, ValueError) as error:  # `datasets` says no data, no network, no such column
        raise DataError(f"evaluation.lm_eval_tasks: {first_line(error)}") from error
    if config.lm_eval_num_fewshot is not None:
        for task in _single(tasks):
            task.set_config("num_fewshot", config.lm_eval_num_fewshot)
    return tasks


def evaluate(
    model: Any, tokenizer: Any, tasks: dict[Any, Any], config: EvaluationConfig, batch_size: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Score `model` on `tasks`, with the same examples in the prompts at each call.

    Returns:
        `lm_eval/TASK/METRIC` of each task and group; and what it came from: `items` (of each its `task`, `item`, which
        is a digest of its text, and metrics), `groups` (the tasks of each) and `lower_is_better` (names of scores).
    """
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.models.huggingface import HFLM

    for task in _single(tasks):
        task.set_fewshot_seed(0)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = run_tasks(wrapped, tasks, limit=config.lm_eval_limit, bootstrap_iters=0, log_samples=True)
    scores = {
        f"lm_eval/{task}/{_name(metric)}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, int | float) and math.isfinite(value)
    }
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for task, samples in found["samples"].items():
        for sample in samples:  # one for each way of reading the answer
            item = items.setdefault((task, sample["doc_hash"]), {"task": task, "item": sample["doc_hash"][:16]})
            values = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], int | float)}
            item |= {_name(f"{name},{sample['filter']}"): value for name, value in values.items()}
    lower = [
        name
        for name in scores
        if found["higher_is_better"].get(name.split("/")[1], {}).get(name.split("/")[2]) is False
    ]
    groups = {group: subtasks for group, subtasks in found["group_subtasks"].items() if subtasks}
    return scores, {"items": [*items.values()], "groups": groups, "lower_is_better": lower}


def fingerprint(items: list[dict[str, Any]]) -> str:
    """A digest of which items were scored, in order."""
    return json_digest([(item["task"], item["item"]) for item in items])


def _single(tasks: dict[Any, Any]) -> list[Any]:
    """The tasks themselves, out of groups of groups."""
    return [one for task in tasks.values() for one in (_single(task) if isinstance(task, dict) else [task])]


def _name(metric: str) -> str:
    """`acc,none` -> `acc`; `exact_match,strict` -> `exact_match/strict`."""
    name, _, how = metric.partition(",")
    return name if how == "none" else f"{name}/{how}"
