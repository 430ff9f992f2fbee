"""Exact match for each prediction: 1 if it equals the reference, ignoring case and differences in white space."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Lists of 0 or 1, one for each prediction."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": [float(_plain(guess) == _plain(target)) for guess, target in pairs]}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
