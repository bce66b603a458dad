"""`evaluate.Metric` subclasses that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score


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


class Accuracy(evaluate.Metric):
    """The share of predictions that are right, times 100."""

    def _info(self) -> evaluate.MetricInfo:
        return _class_info("Accuracy, times 100.")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": 100 * float(accuracy_score(references, predictions))}


class F1(evaluate.Metric):
    """The harmonic mean of precision and recall of class 1 against class 0, times 100."""

    def _info(self) -> evaluate.MetricInfo:
        return _class_info("F1 of class 1, times 100.")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"f1": 100 * float(f1_score(references, predictions, zero_division=0.0))}


def _class_info(description: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references: class numbers, lists of one length.",
        features=datasets.Features(
            {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        ),
    )
