"""Models without an encoder, from scikit-learn: the majority class, and a linear model on TF-IDF."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoring.data import TaskData, Texts

MAJORITY, TFIDF = "majority", "tfidf"
STRENGTHS = (1.0, 10.0)
"""Strengths of the linear model's regularisation; 3-fold cross-validation on train chooses one."""


@dataclass(frozen=True)
class Baseline:
    """A fitted model."""

    model: Any
    parameters: int
    """The number of learned numbers."""

    @property
    def nbytes(self) -> int:
        """Its size as a pickle, with the vocabulary; nothing in this project reads a pickle."""
        return len(pickle.dumps(self.model)) if self.parameters else 0

    def predict(self, texts: Texts) -> NDArray[Any]:
        """The labels as numbers [N], or values for regression."""
        values: NDArray[Any] = self.model.predict(texts)
        return values


def fit_majority(data: TaskData) -> Baseline:
    """Predicts the most frequent label of train; for regression the mean."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    kind = DummyRegressor() if data.task.regression else DummyClassifier(strategy="most_frequent")
    return Baseline(_WithoutTexts(kind.fit(_nothing(len(data.train)), data.train.labels)), 0)


def fit_tfidf(data: TaskData) -> Baseline:
    """Logistic regression (ridge for a regression task) on TF-IDF of words and pairs of words.

    The features of a pair of texts are those of the first text, those of the second, and their products.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    features = PairFeatures()
    train = features.fit(data.train.texts)
    if data.task.regression:
        linear = fit_strength(Ridge(), {"alpha": STRENGTHS}, train, data)
    else:
        linear = fit_strength(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, train, data)
    parameters = int(np.size(linear.coef_) + np.size(linear.intercept_) + features.words)
    return Baseline(_Pipeline(features, linear), parameters)


FOLDS = 3
"""Of the cross-validation that chooses a strength."""


def fit_strength(linear: Any, strengths: Mapping[str, Sequence[float]], features: Any, data: TaskData) -> Any:
    """A linear model of scikit-learn, fitted to the train rows' features [N, …] with the strength that
    cross-validation chooses; with its own strength where a label has fewer rows than there are folds."""
    from sklearn.model_selection import GridSearchCV

    labels = data.train.labels
    rarest = len(labels) if data.task.regression else min(Counter(labels.tolist()).values())
    if rarest < FOLDS:
        return linear.fit(features, labels)
    grid = {key: list(values) for key, values in strengths.items()}
    return GridSearchCV(linear, grid, cv=FOLDS).fit(features, labels).best_estimator_


class PairFeatures:
    """TF-IDF features of one text or of a pair of texts."""

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")

    @property
    def words(self) -> int:
        """The number of words and pairs of words: each has a learned weight."""
        return len(self._tfidf.vocabulary_)

    def fit(self, texts: Texts) -> Any:
        """Learn the vocabulary from `texts`, and return their sparse features [N, one or three times `words`]."""
        self._tfidf.fit([text for row in texts for text in row])
        return self(texts)

    def __call__(self, texts: Texts) -> Any:
        from scipy.sparse import hstack

        blocks = [self._tfidf.transform(column) for column in zip(*texts, strict=True)]
        return hstack([*blocks, blocks[0].multiply(blocks[1])]).tocsr() if len(blocks) == 2 else blocks[0]


@dataclass(frozen=True)
class _Pipeline:
    features: PairFeatures
    linear: Any

    def predict(self, texts: Texts) -> NDArray[Any]:
        values: NDArray[Any] = self.linear.predict(self.features(texts))
        return values


@dataclass(frozen=True)
class _WithoutTexts:
    constant: Any

    def predict(self, texts: Texts) -> NDArray[Any]:
        values: NDArray[Any] = self.constant.predict(_nothing(len(texts)))
        return values


def _nothing(rows: int) -> NDArray[Any]:
    """Features without content, for a model that reads none."""
    return np.zeros((rows, 1))
