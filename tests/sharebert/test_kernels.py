"""The fused operations against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

from sharebert import kernels
from sharebert.kernels import add_dropout_norm, attention, dropped, linear_cross_entropy, linear_gelu
from sharebert.shared_linear import linear

N, K, V = 13, 8, 50


def head_inputs(dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """[hidden, weight, bias] that ask for gradients, labels, and weights, some of them 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, K), (V, K), (V,)][: 3 if bias else 2]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    labels = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator)
    weights[[2, 7, 12]] = 0
    return given, labels, weights


def chunked_loss(given: list[Tensor], labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight, *bias = given
    return linear_cross_entropy(hidden, weight, bias[0] if bias else None, labels, weights)


def plain_loss(given: list[Tensor], labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(*given)
    loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
    return loss, ((logits.argmax(1) == labels) * weights).sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows_at_once", [1, 4, 13, 100])
def test_chunked_cross_entropy_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, rows_at_once: int, bias: bool) -> None:
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), rows_at_once * V + 1))
    given, labels, weights = head_inputs(torch.float64, bias)
    labels[3] = int(F.linear(*given)[3].argmax())  # one right guess at least
    loss, correct = chunked_loss(given, labels, weights)
    expected, expected_correct = plain_loss(given, labels, weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(correct, expected_correct.double())
    assert correct > 0
    assert not correct.requires_grad
    for a, b in zip(torch.autograd.grad(loss * 3, given), torch.autograd.grad(expected * 3, given), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_of_weight_zero_do_nothing() -> None:
    given, labels, weights = head_inputs(torch.float64)
    loss, _ = chunked_loss(given, labels, weights)
    (gradient,) = torch.autograd.grad(loss, given[:1])
    assert (gradient[weights == 0] == 0).all()
    kept = weights > 0
    fewer, _ = linear_cross_entropy(given[0][kept], given[1], given[2], labels[kept], weights[kept])
    torch.testing.assert_close(loss, fewer)


@pytest.mark.parametrize("way", ["parameters", "autocast"])
def test_bfloat16_loss_is_summed_in_float32(way: str) -> None:
    given, labels, weights = head_inputs(torch.bfloat16 if way == "parameters" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss, correct = chunked_loss(given, labels, weights)
    assert loss.dtype == correct.dtype == torch.float32
    exact = [p.detach().double().requires_grad_() for p in given]
    expected, _ = plain_loss(exact, labels, weights)
    torch.testing.assert_close(loss.double(), expected, rtol=0.01, atol=0)
    ours, theirs = torch.autograd.grad(loss, given), torch.autograd.grad(expected, exact)
    for a, b, parameter in zip(ours, theirs, given, strict=True):
        assert a.dtype == parameter.dtype
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.02)


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), 4 * 1000))
    hidden = torch.randn(64, K, requires_grad=True)
    weight = torch.randn(1000, K, requires_grad=True)
    labels = torch.zeros(64, dtype=torch.int64)
    with profile(profile_memory=True) as recorded:
        loss, _ = linear_cross_entropy(hidden, weight, None, labels, torch.ones(64))
        loss.backward()
    largest = max(event.self_cpu_memory_usage for event in recorded.events() or ())
    assert largest == 2 * 4 * 1000 * 4  # a chunk of logits, and what logsumexp makes of it; never 64 · 1000


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    given, labels, weights = head_inputs(torch.float32)
    with torch.no_grad():
        loss, _ = chunked_loss(given, labels, weights)
    assert not loss.requires_grad
    frozen = [given[0], given[1].detach(), given[2].detach()]
    loss, _ = chunked_loss(frozen, labels, weights)
    loss.backward()
    assert given[0].grad is not None
    assert given[1].grad is None


def test_a_second_backward_is_refused() -> None:
    given, labels, weights = head_inputs(torch.float32)
    loss, _ = chunked_loss(given, labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linear_and_gelu() -> None:
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(4, 5), torch.randn(5)
    expected = torch.einsum("bti,io->bto", x, weight) + bias
    torch.testing.assert_close(linear(x, weight, bias), expected)
    exact = expected * (1 + torch.erf(expected / 2**0.5)) / 2
    torch.testing.assert_close(linear_gelu(x, weight, bias), exact)


def test_add_dropout_norm() -> None:
    stream, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    weight, bias = torch.randn(8), torch.randn(8)
    summed, normed = add_dropout_norm(stream, branch, weight, bias, 1e-5, 0.0)
    torch.testing.assert_close(summed, stream + branch)
    torch.testing.assert_close(normed, F.layer_norm(stream + branch, (8,), weight, bias, 1e-5))
    alone, _ = add_dropout_norm(stream, None, weight, bias, 1e-5, 0.5)
    assert alone is stream


def test_stream_stays_float32_under_autocast_and_its_norm_is_cast_once() -> None:
    stream, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        summed, normed = add_dropout_norm(stream, branch, torch.ones(8), torch.zeros(8), 1e-5, 0.0)
    assert summed.dtype == torch.float32
    assert normed.dtype == torch.bfloat16


def test_dropout_drops_its_share_of_the_branch_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    ones = torch.ones(100, 1000)
    summed, _ = add_dropout_norm(torch.zeros(100, 1000), ones, torch.ones(1000), torch.zeros(1000), 1e-5, 0.1)
    assert (summed == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    torch.testing.assert_close(summed[summed != 0].unique(), torch.tensor([1 / 0.9]))


def test_dropout_on_a_cpu_has_the_rate_asked_for_and_one_mask_for_both_passes() -> None:
    torch.manual_seed(0)
    x = torch.randn(301, 333, requires_grad=True)
    y = dropped(x, 0.1)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.003)
    for neighbour in (1, 2, 333):  # neighbours come from one 64-bit number
        flat = kept.flatten()
        assert (flat[neighbour:] & flat[:-neighbour]).float().mean().item() == pytest.approx(0.81, abs=0.005)
    torch.testing.assert_close(y, torch.where(kept, x / 0.9, 0.0), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept / 0.9, rtol=1e-4, atol=0)


@pytest.mark.parametrize("seen", [None, (1, 1, 1, 7), (3, 1, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_with_dropout_on_a_cpu_is_the_plain_formula(dtype: torch.dtype, seen: tuple[int, ...] | None) -> None:
    """With the mask that `dropped` draws from the same random state; forward and gradients."""
    torch.manual_seed(0)
    query, key, value, gradient = (torch.randn(3, n, 2, 8, dtype=dtype).transpose(1, 2) for n in (5, 7, 7, 5))
    given = [x.requires_grad_() for x in (query, key, value)]
    mask = None if seen is None else torch.rand(seen) < 0.7
    if mask is not None:
        mask[..., 0] = True

    torch.manual_seed(1)
    kept = dropped(torch.ones(3, 2, 5, 7, dtype=torch.float64), 0.3)
    scores = query.double() @ key.double().mT * 0.4
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) * kept) @ value.double()
    expected_gradients = torch.autograd.grad(expected, given, gradient.double())

    torch.manual_seed(1)
    output = attention(*given, mask, 0.4, 0.3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(output, given, gradient), expected_gradients, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=tolerance, atol=tolerance)


def test_attention_with_dropout_on_a_cpu_copies_no_layout() -> None:
    """Output and gradients lie as the layers' products take them: [B, T, heads, d] in memory."""
    query, key, value = torch.randn(3, 2, 5, 3, 4).requires_grad_().transpose(2, 3).unbind()
    output = attention(query, key, value, None, 1.0, 0.1)
    for made in (output, *torch.autograd.grad(output.sum(), (query, key, value))):
        assert made.transpose(1, 2).is_contiguous()


def test_attention_scale_and_mask() -> None:
    query, key, value = torch.randn(3, 2, 2, 5, 4).unbind()
    mask = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool).view(1, 1, 1, 5)
    scores = (query @ key.mT * 0.3).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ value
    torch.testing.assert_close(attention(query, key, value, mask, 0.3, 0.0), expected)


def test_attention_dropout_is_on_probabilities() -> None:
    """With values all 1, an output is the sum of the kept probabilities / 0.9: its mean stays 1."""
    torch.manual_seed(0)
    query, key = torch.zeros(2, 1, 50, 200, 4).unbind()
    output = attention(query, key, torch.ones(1, 50, 200, 4), None, 1.0, 0.1)
    assert output.mean().item() == pytest.approx(1, abs=0.002)
    assert output[..., 0].std().item() == pytest.approx((0.1 / 0.9 / 200) ** 0.5, rel=0.05)


def test_short_rows_keep_documents_apart_by_sdpa_also_on_cuda() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [kernels.flex_serves(cuda, length) for length in (128, 256, 257, 512)] == [False, False, True, True]
    assert not kernels.flex_serves(cpu, 512)


def test_a_gpu_takes_larger_chunks_of_logits() -> None:
    assert kernels.CHUNK_LOGITS["cuda"] // 30_528 >= 8_192
