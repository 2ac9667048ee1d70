"""Each loss against a transcription by loops, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from exports import distill_losses as losses

B, T, N, V = 2, 5, 4, 7
WEIGHTS = torch.tensor([[1.0, 1.0, 0.5, 0.0, 1.0], [0.3, 1.0, 1.0, 1.0, 0.0]])
VISIBLE = torch.ones(B, T, T, dtype=torch.bool)
VISIBLE[0, :, 3] = False
VISIBLE[1, :3, 3:] = False
VISIBLE[1, 3:, :3] = False


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).float()


def softmax(values: list[Tensor]) -> list[Tensor]:
    exps = [value.exp() for value in values]
    return [e / sum(exps) for e in exps]


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], student: Tensor) -> None:
    """The value, and the gradient of the student."""
    found = []
    for make in (ours, theirs):
        given = student.clone().requires_grad_()
        value = make(given)
        (gradient,) = torch.autograd.grad(value, given)
        found.append((value.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits(temperature: float) -> None:
    student, teacher, weights = made(N, V), made(N, V), torch.tensor([1.0, 0.0, 0.5, 1.0])

    def by_loops(given: Tensor) -> Tensor:
        total = torch.zeros(())
        for n in range(N):
            p = softmax([teacher[n, v] / temperature for v in range(V)])
            q = softmax([given[n, v] / temperature for v in range(V)])
            total = total + weights[n] * temperature**2 * sum(p[v] * (p[v] / q[v]).log() for v in range(V))
        return total

    same(lambda x: losses.logits_loss(x, teacher, weights, temperature), by_loops, student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_of_some_words(temperature: float) -> None:
    student, teacher, weights = made(N, V), made(N, V), torch.tensor([1.0, 0.0, 0.5, 1.0])
    top = teacher.topk(3)
    rest = torch.tensor(
        [
            math.log(sum(math.exp(teacher[n, v] / temperature) for v in range(V) if v not in top.indices[n].tolist()))
            for n in range(N)
        ]
    )

    def by_loops(given: Tensor) -> Tensor:
        total = torch.zeros(())
        for n in range(N):
            p = softmax([teacher[n, v] / temperature for v in range(V)])
            q = softmax([given[n, v] / temperature for v in range(V)])
            kept = top.indices[n].tolist()
            others = [v for v in range(V) if v not in kept]
            pairs = [(p[v], q[v]) for v in kept] + [(sum(p[v] for v in others), sum(q[v] for v in others))]  # type: ignore[misc]
            total = total + weights[n] * temperature**2 * sum(a * (a / b).log() for a, b in pairs)
        return total

    def ours(given: Tensor) -> Tensor:
        return losses.top_words_loss(given, top.values, top.indices, rest, weights, temperature)

    same(ours, by_loops, student)
    full = losses.logits_loss(student, teacher, weights, temperature)
    assert 0 < ours(student) < full
    all_but_one = teacher.topk(V - 1)
    last = teacher.amin(-1) / temperature
    found = losses.top_words_loss(student, all_but_one.values, all_but_one.indices, last, weights, temperature)
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-6)


def test_hidden_and_cosine() -> None:
    student, teacher = made(B, T, 6), made(B, T, 6)

    def squares(given: Tensor) -> Tensor:
        return sum(  # type: ignore[return-value]
            WEIGHTS[b, t] * sum((given[b, t, i] - teacher[b, t, i]) ** 2 for i in range(6)) / 6
            for b in range(B)
            for t in range(T)
        )

    def angles(given: Tensor) -> Tensor:
        total = torch.zeros(())
        for b in range(B):
            for t in range(T):
                dot = sum(given[b, t, i] * teacher[b, t, i] for i in range(6))
                lengths = [sum(x[b, t, i] ** 2 for i in range(6)) ** 0.5 for x in (given, teacher)]
                total = total + WEIGHTS[b, t] * (1 - dot / (lengths[0] * lengths[1]))
        return total

    same(lambda x: losses.hidden_loss(x, teacher, WEIGHTS), squares, student)
    same(lambda x: losses.cosine_loss(x, teacher, WEIGHTS), angles, student)


def test_attention_scores() -> None:
    heads, d, scale = 2, 3, 0.7
    keys, teacher = made(B, heads, T, d), made(B, heads, T, T)

    def by_loops(query: Tensor) -> Tensor:
        total = torch.zeros(())
        for b in range(B):
            for i in range(T):
                seen = [j for j in range(T) if VISIBLE[b, i, j]]
                differences = [
                    (scale * sum(query[b, h, i, k] * keys[b, h, j, k] for k in range(d)) - teacher[b, h, i, j]) ** 2
                    for h in range(heads)
                    for j in seen
                ]
                total = total + WEIGHTS[b, i] * sum(differences) / len(differences)
        return total

    def ours(query: Tensor) -> Tensor:
        return losses.attention_loss(losses.scores_of((query, keys, keys), scale), teacher, WEIGHTS, VISIBLE)

    same(ours, by_loops, made(B, heads, T, d))


def test_attention_probabilities() -> None:
    heads, d, scale = 2, 3, 0.7
    keys, teacher = made(B, heads, T, d), made(B, heads, T, T)

    def by_loops(query: Tensor) -> Tensor:
        total = torch.zeros(())
        for b in range(B):
            for i in range(T):
                seen = [j for j in range(T) if VISIBLE[b, i, j]]
                for h in range(heads):
                    scores = [scale * sum(query[b, h, i, k] * keys[b, h, j, k] for k in range(d)) for j in seen]
                    p, q = softmax([teacher[b, h, i, j] for j in seen]), softmax(scores)  # type: ignore[arg-type]
                    divergence = sum(x * (x / y).log() for x, y in zip(p, q, strict=True))
                    total = total + WEIGHTS[b, i] * divergence / heads
        return total

    def ours(query: Tensor) -> Tensor:
        return losses.attention_kl_loss(losses.scores_of((query, keys, keys), scale), teacher, WEIGHTS, VISIBLE)

    same(ours, by_loops, made(B, heads, T, d))
    nothing = torch.zeros(B, T, T, dtype=torch.bool)
    query = made(B, heads, T, d).requires_grad_()
    losses.attention_kl_loss(
        losses.scores_of((query, keys, keys), scale), teacher, torch.zeros(B, T), nothing
    ).backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("heads_at_once", [3, 4])
def test_relations_of_models_with_other_widths_and_heads(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student of 2 heads of 6 and a teacher of 4 heads of 2, regrouped to 4 relation heads of 3 and of 2."""
    monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", heads_at_once * B * T * T)
    relation_heads = 4
    student, others = made(B, 2, T, 6), [made(B, 2, T, 6) for _ in range(2)]
    teacher = tuple(made(B, 4, T, 2) for _ in range(3))

    def relation(x: Tensor, b: int, r: int, i: int) -> dict[int, Tensor]:
        width = x.shape[1] * x.shape[3]
        d = width // relation_heads

        def vector(t: int) -> list[Tensor]:
            return [x[b, c // x.shape[3], t, c % x.shape[3]] for c in range(r * d, (r + 1) * d)]

        seen = [j for j in range(T) if VISIBLE[b, i, j]]
        scores = [sum(p * q for p, q in zip(vector(i), vector(j), strict=True)) / math.sqrt(d) for j in seen]
        return dict(zip(seen, softmax(scores), strict=True))

    def by_loops(given: Tensor) -> Tensor:
        total = torch.zeros(())
        for ours, theirs in zip((given, *others), teacher, strict=True):
            for b in range(B):
                for i in range(T):
                    for r in range(relation_heads):
                        p, q = relation(theirs, b, r, i), relation(ours, b, r, i)
                        divergence = sum(p[j] * (p[j] / q[j]).log() for j in p)
                        total = total + WEIGHTS[b, i] * divergence / relation_heads / 3
        return total

    def ours(given: Tensor) -> Tensor:
        return losses.relations_loss((given, *others), teacher, relation_heads, WEIGHTS, VISIBLE)  # type: ignore[arg-type]

    same(ours, by_loops, student)


def test_equal_models_have_no_loss_and_padding_alone_has_no_gradient_of_nan() -> None:
    states = made(B, 2, T, 6)
    nothing = VISIBLE & False
    given = states.clone().requires_grad_()
    three = (given, given, given)
    value = losses.relations_loss(three, (states,) * 3, 2, WEIGHTS, VISIBLE)
    assert value.item() == pytest.approx(0, abs=1e-6)
    unseen = losses.relations_loss(three, (states,) * 3, 2, 0 * WEIGHTS, nothing)
    unseen = unseen + losses.attention_loss(given @ given.mT, states @ states.mT, 0 * WEIGHTS, nothing)
    (gradient,) = torch.autograd.grad(unseen, given)
    assert torch.equal(gradient, torch.zeros_like(gradient))
