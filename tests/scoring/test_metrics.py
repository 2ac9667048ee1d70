"""GLUE's metrics against their formulas."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from scoring.metrics import measure
from scoring.tasks import TASKS

TRUE = np.array([1, 1, 1, 0, 0, 1, 0, 1])
PREDICTED = np.array([1, 0, 1, 1, 0, 1, 0, 1])  # 4 true positives, 1 false, 2 true negatives, 1 false


def test_classification() -> None:
    found = measure(("accuracy", "f1", "matthews"), PREDICTED, TRUE)
    assert found == {
        "accuracy": 6 / 8,
        "f1": pytest.approx(2 * 4 / (2 * 4 + 1 + 1)),
        "matthews": pytest.approx((4 * 2 - 1 * 1) / sqrt(5 * 5 * 3 * 3)),
    }


def test_correlations() -> None:
    true = np.array([0.0, 1.0, 2.0, 3.0])
    found = measure(("pearson", "spearman"), np.exp(true), true)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef(np.exp(true), true)[0, 1])


def test_a_constant_prediction_scores_0() -> None:
    assert measure(("matthews", "f1"), np.zeros(8, int), TRUE) == {"matthews": 0, "f1": 0}
    assert measure(("pearson", "spearman"), np.zeros(4), np.arange(4.0)) == {"pearson": 0, "spearman": 0}


def test_a_correlation_of_one_row_is_0() -> None:
    assert measure(("pearson", "spearman"), np.array([1.0]), np.array([2.0])) == {"pearson": 0, "spearman": 0}


def test_the_metrics_of_glue() -> None:
    """Wang et al. 2019, table 1."""
    assert {name: task.metrics for name, task in TASKS.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("f1", "accuracy"),
        "stsb": ("pearson", "spearman"),
        "qqp": ("f1", "accuracy"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
