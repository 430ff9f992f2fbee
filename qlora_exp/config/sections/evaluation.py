"""Section `evaluation`: what is measured before and after training."""

from pydantic import PositiveInt

from qlora_exp.config.sections.base import NonNegative, PluginName, Section


class EvaluationConfig(Section):
    """What is measured on the held-out rows, before and after training."""

    before: bool = True
    """Measure before training too."""
    generate_rows: NonNegative = 16
    """Number of held-out rows to generate answers for. 0: none."""
    max_new_tokens: PositiveInt = 64
    """Largest number of tokens in a generated answer."""
    generation_batch_size: PositiveInt = 8
    """Answers generated at the same time."""
    metrics: list[PluginName] = ["rouge", "exact_match"]
    """Metrics that compare generated answers with the references: rouge, exact_match, and those of installed packages
    (docs/how_to/add_a_metric.md). A dataset with its own scorer adds its score."""
    lm_eval_tasks: list[str] = []
    """Tasks and groups of lm-eval, such as mmlu, to run before and after training."""
    lm_eval_include_path: str | None = None
    """Folder with your own lm-eval task files. They can run code: use only files that you trust."""
    lm_eval_num_fewshot: NonNegative | None = None
    """Number of solved examples in the prompt. null: each task's own number."""
    lm_eval_limit: PositiveInt | None = None
    """Largest number of items per task. null: all."""
