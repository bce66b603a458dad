"""`evaluate.Metric` subclasses that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from scipy.stats import spearmanr


class SpearmanCorrelation(evaluate.Metric):
    """Spearman's rank correlation of predictions and references, times 100 as papers print it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Spearman's rank correlation coefficient, times 100.",
            citation="",
            inputs_description="predictions and references: lists of numbers of one length.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"spearman": 100 * float(spearmanr(predictions, references).statistic)}
