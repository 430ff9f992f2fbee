"""The section `evaluation`: what is measured before and after training."""

from typing import Literal

from pydantic import PositiveInt

from qlora_exp.config.sections.base import NonNegative, Section


class EvaluationConfig(Section):
    """What is measured on the held-out rows, before and after training."""

    before: bool = True
    """Measure the untrained model too."""
    generate_rows: NonNegative = 16
    """Held-out rows to generate answers for; 0: none."""
    max_new_tokens: PositiveInt = 64
    generation_batch_size: PositiveInt = 8
    metrics: list[Literal["rouge", "exact_match"]] = ["rouge", "exact_match"]
    """Of generated answers against the references. A dataset with its own scorer adds its score."""
    lm_eval_tasks: list[str] = []
    """Tasks and groups of lm-eval-harness, such as mmlu, before and after training."""
    lm_eval_include_path: str | None = None
    """A folder of task files of your own. They can run code: only those you trust."""
    lm_eval_num_fewshot: NonNegative | None = None
    """null: as each task says."""
    lm_eval_limit: PositiveInt | None = None
    """Items of each task; null: all."""
