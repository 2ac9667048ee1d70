"""The reference `static:FOLDER`: a vector for each word and no layers, the floor in bytes and in time.

As model2vec (Tulkens and van Dongen, 2024) makes it from a model: the vector of a word is the mean output for
`[CLS] word [SEP]`; principal components of all vectors; SIF weights a / (a + p) (Arora, Liang, Ma, "A Simple but
Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017) with p by Zipf's law, because vocabularies are sorted by
frequency. A text is the mean of its words, and a logistic regression (ridge for a regression task) predicts its label.
`static-int8:FOLDER` stores the vectors in 8 bits with one scale.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.recipe import CompressRecipe
from compress.source import open_hub_model, open_source
from exports.read import load_model
from scoring.baselines import fit_strength
from scoring.data import TaskData, Texts, load_task
from scoring.encoders import Encoder, open_encoder
from scoring.metrics import measure
from scoring.recipe import FineTuneRecipe

STATIC, STATIC_INT8 = "static:", "static-int8:"
"""Before a folder: the static vectors of the model there, in fp32 or in int8."""

DIMENSIONS = 256
"""Principal components that are kept, at most; model2vec's default."""

SIF = 1e-4
"""a of the weights; model2vec's default."""

WORDS_AT_ONCE = 1024

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""C of the logistic regression; 3-fold cross-validation on train chooses one."""

Matrix = NDArray[np.float32]


def static_scores(name: str, recipe: CompressRecipe) -> tuple[dict[str, list[float]], int, int]:
    """Scores on the recipe's task ("split metric" → its value), parameters, and their bytes; nothing is random."""
    from sklearn.linear_model import LogisticRegression, Ridge

    assert recipe.task is not None
    folder = Path(name.partition(":")[2])
    data = load_task(recipe.task.task, recipe.task.data)
    encoder = open_encoder(str(folder), FineTuneRecipe(max_length=recipe.task.finetune.max_length))
    vectors = weighted(components(word_vectors(folder, encoder)))
    size = vectors.nbytes
    if name.startswith(STATIC_INT8):
        codes, scale = in_int8(vectors)
        vectors, size = (codes * scale).astype(np.float32), codes.nbytes + scale.nbytes
    train = features(data.train.texts, vectors, encoder)
    if data.task.regression:
        linear = Ridge().fit(train, data.train.labels)
    else:
        linear = fit_strength(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, train, data)
    size += 4 * (linear.coef_.size + np.size(linear.intercept_))
    parameters = vectors.size + linear.coef_.size + np.size(linear.intercept_)
    return _scores(data, lambda texts: linear.predict(features(texts, vectors, encoder))), parameters, size


def _scores(data: TaskData, predict: Callable[[Texts], NDArray[np.float64]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for split, rows in data.held_out.items():
        values = measure(data.task.metrics, predict(rows.texts), rows.labels)
        found |= {f"{split} {metric}": [value] for metric, value in values.items()}
    return found


@torch.no_grad()
def word_vectors(folder: Path, encoder: Encoder) -> Matrix:
    """The mean output of the model in `folder` for `[CLS] word [SEP]`, of every word, [V, H]."""
    if open_source(folder).form == "compact":
        compact = load_model(folder).sharebert

        def outputs(ids: Tensor) -> Tensor:
            return compact(ids, pool=False).hidden  # type: ignore[no-any-return]
    else:
        stock = open_hub_model(folder)

        def outputs(ids: Tensor) -> Tensor:
            return stock(input_ids=ids).last_hidden_state  # type: ignore[no-any-return]

    first, last = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    found = []
    for words in torch.arange(encoder.words).split(WORDS_AT_ONCE):
        ids = torch.stack([torch.full_like(words, first), words, torch.full_like(words, last)], 1)
        found.append(outputs(ids).mean(1))
    return torch.cat(found).numpy()


def components(vectors: Matrix, dimensions: int = DIMENSIONS) -> Matrix:
    """The vectors [V, H] in their first principal components [V, min(H, dimensions)]."""
    centred = vectors - vectors.mean(0)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    found: Matrix = (centred @ axes[:, ::-1][:, :dimensions]).astype(np.float32)
    return found


def weighted(vectors: Matrix) -> Matrix:
    """The vectors times a / (a + p), with p ∝ 1 / rank."""
    inverse = 1 / np.arange(2, len(vectors) + 2)
    found: Matrix = (vectors * (SIF / (SIF + inverse / inverse.sum()))[:, None]).astype(np.float32)
    return found


def in_int8(vectors: Matrix) -> tuple[NDArray[np.int8], np.float32]:
    """Codes, and the one scale by which they are multiplied."""
    scale = np.float32(np.abs(vectors).max() / 127)
    return np.round(vectors / scale).astype(np.int8), scale


def features(texts: Texts, vectors: Matrix, encoder: Encoder) -> Matrix:
    """The mean of the words of each text, at length 1; of a pair of texts u and v: u, v, |u − v| and u·v."""
    means = [_means([(row[place],) for row in texts], vectors, encoder) for place in range(len(texts[0]))]
    if len(means) == 1:
        return means[0]
    u, v = means
    return np.concatenate([u, v, np.abs(u - v), u * v], axis=1)


def _means(texts: Texts, vectors: Matrix, encoder: Encoder) -> Matrix:
    special = set(encoder.tokenizer.all_special_ids)
    found = np.zeros((len(texts), vectors.shape[1]), np.float32)
    for row, ids in enumerate(encoder.encode(texts, "text").columns["input_ids"]):
        words = [word for word in ids if word not in special]
        if words:
            found[row] = vectors[words].mean(0)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
