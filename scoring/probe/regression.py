"""Logistic regression on word vectors. It starts at zero and has no random numbers, so a second call gives the same.

The loss is that of scikit-learn with C = 1: the sum of the cross-entropies plus half the squared norm of the weights,
here divided by the number of words. Vectors are standardised by the mean and standard deviation of the train words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS, TOLERANCE = 100, 1e-4
"""The most steps of L-BFGS, and the largest gradient at which it ends: those of scikit-learn."""


def predict(train: Tensor, labels: Tensor, classes: int, held_out: Tensor) -> Tensor:
    """The labels [m] that logistic regression gives words, after a fit to other words.

    Args:
        train: [layers, n, H], vectors of the train words; several layers are mixed by a softmax of learned numbers.
        labels: [n], the number of each one's label.
        classes: labels that there are.
        held_out: [layers, m, H].
    """
    mean, spread = train.mean(1, keepdim=True), train.std(1, keepdim=True).clamp(min=1e-6)
    train, held_out = (train - mean).div_(spread), (held_out - mean).div_(spread)
    mix = torch.zeros(len(train), requires_grad=len(train) > 1)
    weight = torch.zeros(train.shape[2], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    parameters = [p for p in (mix, weight, bias) if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, tolerance_grad=TOLERANCE, line_search_fn="strong_wolfe")

    def scores(x: Tensor) -> Tensor:
        one = x[0] if len(x) == 1 else torch.einsum("l,lnh->nh", mix.softmax(0), x)
        return torch.addmm(bias, one, weight)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scores(train), labels) + weight.square().sum() / (2 * len(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return scores(held_out).argmax(1)
