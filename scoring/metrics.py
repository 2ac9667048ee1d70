"""GLUE's metrics, from scikit-learn and SciPy. Each takes `predicted` and `true` [N]; a perfect score is 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
"""[N]: labels as numbers, or float64 values for regression."""


def accuracy(predicted: Values, true: Values) -> float:
    """The share of correct predictions."""
    return float(np.mean(predicted == true))


def f1(predicted: Values, true: Values) -> float:
    """F1 of label 1; 0 if no row has it and none is predicted to have it."""
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, pos_label=1, average="binary", zero_division=0))


def matthews(predicted: Values, true: Values) -> float:
    """Matthews' correlation; 0 for a constant prediction."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(true, predicted))


def pearson(predicted: Values, true: Values) -> float:
    """Pearson's correlation; 0 where it is not defined: for a constant prediction, and for one row."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, true)


def spearman(predicted: Values, true: Values) -> float:
    """Spearman's correlation; 0 where it is not defined: for a constant prediction, and for one row."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, true)


METRICS: dict[str, Callable[[Values, Values], float]] = {
    function.__name__: function for function in (accuracy, f1, matthews, pearson, spearman)
}


def measure(names: Sequence[str], predicted: Values, true: Values) -> dict[str, float]:
    """The values of the metrics `names`, by name."""
    return {name: METRICS[name](predicted, true) for name in names}


def _correlation(function: Callable[..., Any], predicted: Values, true: Values) -> float:
    if len(true) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns about constant input and returns NaN
        value = float(function(predicted, true).statistic)
    return 0.0 if isnan(value) else value
