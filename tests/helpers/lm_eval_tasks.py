"""A task of lm-eval in files of one's own."""

import json
from pathlib import Path

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}} ="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def write_task(folder: Path) -> Path:
    """Write a task of ten items into a new folder."""
    rows = [{"question": f"{n} + 1", "choices": [str(n + 1), str(n + 2)], "answer": n % 2} for n in range(10)]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def task_overrides(folder: Path) -> list[str]:
    """Give the overrides with which a run is scored by that task."""
    return ["evaluation.lm_eval_tasks=[sums]", f"evaluation.lm_eval_include_path={folder}"]
