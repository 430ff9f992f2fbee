"""ROUGE-1, -2 and -L F-measures for each prediction (Lin 2004), by Google's rouge-score with stemming."""

import datasets
import evaluate
from rouge_score import rouge_scorer

KINDS = ["rouge1", "rouge2", "rougeL"]


class Rouge(evaluate.Metric):
    """Lists of F-measures, one for each prediction, 0..1."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
        scores = [scorer.score(target, guess) for guess, target in zip(predictions, references, strict=True)]
        return {kind: [score[kind].fmeasure for score in scores] for kind in KINDS}
