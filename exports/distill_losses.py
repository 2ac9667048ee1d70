"""Which layers of a student learn from which of its teacher, and the losses between the two.

A loss is a sum over positions or rows that the caller weights. Each is in nats or in the units of its values, and a
mean over what belongs to one position, so that it does not depend on how rows are cut into micro-batches. All sums are
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sharebert_common.errors import BadInput

LayerPairs = tuple[tuple[int, int], ...]
"""Layers of a student and of its teacher, from 1; 0 is the embeddings."""

Projections = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of a layer, each [B, heads, T, d]."""

NUMBERS_AT_ONCE = 2**22
"""Of scores, in a tensor of `relations_loss`, unless one head has more. glibc maps memory above 32 MB anew each time,
so that larger tensors take twice as long on a CPU."""


def layer_pairs(
    given: Sequence[tuple[int, int]] | None,
    layers: tuple[int, int],
    key: str,
    names: tuple[str, str] = ("student", "teacher"),
) -> LayerPairs:
    """The pairs that were given; none: each of the student's layers i with i · teacher's layers / student's layers.

    Args:
        given: what the recipe has under `key`.
        layers: how many the student and the teacher have.
        key: of the recipe, for errors.
        names: of the two models, for errors.

    Raises BadInput: a layer that does not exist, or no pair at all.
    """
    if given is None:
        ours, theirs = layers
        return tuple((i, max(1, round(i * theirs / ours))) for i in range(1, ours + 1))
    refuse_no_pair(given, key)
    for pair in given:
        for layer, name, last in zip(pair, names, layers, strict=True):
            if not 0 <= layer <= last:
                raise BadInput(f"{key}: the {name} has layers 1 to {last} and embeddings (0), and no {layer}")
    return tuple(given)


def refuse_no_pair(given: Sequence[tuple[int, int]], key: str) -> None:
    """Raise BadInput, naming the key, for a list without a pair."""
    if not given:
        raise BadInput(f"{key}: names no pair; leave it out for a pair for each layer of the student")


def without_embeddings(pairs: LayerPairs) -> LayerPairs:
    """The pairs that have queries and keys on both sides."""
    return tuple(pair for pair in pairs if 0 not in pair)


def logits_loss(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Σ w · T² · KL(teacher ‖ student) of the words' distributions softened by T (Hinton, Vinyals, Dean, 2015).

    T² keeps the gradient's size. Both logits are [N, V], weights [N].
    """
    expected = F.log_softmax(teacher.float() / temperature, -1)
    found = F.log_softmax(student.float() / temperature, -1)
    divergence = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    return temperature**2 * (weights * divergence).sum()


def top_words_loss(
    student: Tensor, teacher: Tensor, words: Tensor, rest: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """As `logits_loss`, where of the teacher only some words are known, and all others count as one word.

    Never more than `logits_loss`, and equal to it where all words but one are known.

    Args:
        student: logits [N, V].
        teacher: logits [N, K] of `words`.
        words: [N, K], K < V.
        rest: [N], log Σ exp(logit / T) of the teacher over all other words.
        weights: [N].
        temperature: T.
    """
    expected = F.log_softmax(torch.cat((teacher.float() / temperature, rest.float()[:, None]), -1), -1)
    all_found = F.log_softmax(student.float() / temperature, -1)
    others = all_found.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    found = torch.cat((all_found.gather(-1, words), others), -1)
    divergence = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    return temperature**2 * (weights * divergence).sum()


def hidden_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Σ w · mean over the width of (student - teacher)² (TinyBERT, Jiao et al., 2020, equation 8).

    Both are [B, T, width], weights [B, T].
    """
    return (weights * (student.float() - teacher.float()).square().mean(-1)).sum()


def cosine_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Σ w · (1 - cosine of the two states) (DistilBERT, Sanh et al., 2019); shapes as in `hidden_loss`."""
    return (weights * (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1))).sum()


def scores_of(projections: Projections, scale: float) -> Tensor:
    """The attention scores [B, heads, T, T] of a layer, before softmax."""
    query, key, _ = projections
    return scale * (query @ key.transpose(-1, -2))


def attention_loss(student: Tensor, teacher: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
    """Σ w · mean over heads and visible keys of (score - score)², before softmax (TinyBERT, equation 7).

    Args:
        student: scaled scores [B, heads, T, T].
        teacher: likewise, with as many heads.
        weights: of the queries, [B, T].
        visible: [B, T, T] booleans, which keys a query sees.
    """
    squared = (student.float() - teacher.float()).square().mean(1)
    of_query = (squared * visible).sum(-1) / visible.sum(-1).clamp(min=1)
    return (weights * of_query).sum()


def attention_kl_loss(student: Tensor, teacher: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
    """Σ w · mean over heads of KL(teacher ‖ student) of what a query gives to the keys that it sees (MobileBERT, Sun et
    al., 2020, equation 3). Args as in `attention_loss`."""
    return (weights * _divergence(student, teacher, visible).mean(1)).sum()


def relations_loss(student: Projections, teacher: Projections, heads: int, weights: Tensor, visible: Tensor) -> Tensor:
    """Σ w · mean over the relations of queries, keys and values of KL(teacher ‖ student) (MiniLMv2, Wang et al., 2021).

    The relation of vectors a is softmax(a·aᵀ/√d) over the keys that a query sees. All heads of a layer are joined and
    split anew into `heads` relation heads, so that widths and numbers of heads of the two models may differ. A mean
    over the relation heads.

    Args:
        student: of one layer.
        teacher: of one layer.
        heads: relation heads; both widths are multiples of it.
        weights: of the queries, [B, T].
        visible: [B, T, T] booleans.
    """
    total = weights.new_zeros(())
    at_once = max(1, NUMBERS_AT_ONCE // max(1, visible.numel()))
    for vectors in zip(student, teacher, strict=True):
        groups = (_regrouped(x, heads).split(at_once, 1) for x in vectors)
        for ours, theirs in zip(*groups, strict=True):
            of_query = _divergence(_relation(ours), _relation(theirs), visible).sum(1)
            total = total + (weights * of_query).sum()
    return total / len(student) / heads


def _regrouped(x: Tensor, heads: int) -> Tensor:
    """Vectors [B, heads of attention, T, d] as float32 ones of `heads` heads."""
    return x.float().transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)


def _relation(x: Tensor) -> Tensor:
    """The relation [B, heads, T, T] of vectors [B, heads, T, d], before softmax."""
    return (x * x.shape[-1] ** -0.5) @ x.transpose(-1, -2)


def _divergence(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """KL(teacher ‖ student) [B, heads, T] of softmaxes of scores [B, heads, T, T] over the keys that a query sees."""
    found, expected = _distributions(student, visible), _distributions(teacher, visible)
    return (expected.exp() * (expected - found)).sum(-1)


def _distributions(scores: Tensor, visible: Tensor) -> Tensor:
    """Logarithms of the softmax of scores [B, heads, T, T] over the keys that a query sees."""
    # A position that sees nothing has weight 0; a finite number keeps NaN out of its gradient.
    return F.log_softmax(scores.float().masked_fill(~visible[:, None], torch.finfo(torch.float32).min), -1)
