"""The encoder in training: padding, documents, dropout, precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from sharebert import ShareBertError


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_padding_changes_nothing() -> None:
    model = tiny_model().double().eval()
    tokens = tokens_of(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[:, 7:] = 0
    padded = model.sharebert(tokens, mask)
    alone = model.sharebert(tokens[:, :7])
    torch.testing.assert_close(padded.hidden[:, :7], alone.hidden)
    torch.testing.assert_close(padded.pooled, alone.pooled)


def test_all_ones_is_no_mask_and_type_zero_is_the_default() -> None:
    model = tiny_model().double().eval()
    tokens = tokens_of(2, 9)
    explicit = model.sharebert(tokens, torch.ones_like(tokens), torch.zeros_like(tokens))
    torch.testing.assert_close(model.sharebert(tokens).hidden, explicit.hidden)
    other_type = model.sharebert(tokens, None, torch.ones_like(tokens))
    assert (other_type.hidden - explicit.hidden).abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["attention_mask", "document_ids"])
def test_row_of_padding_alone_is_finite_with_its_gradients(padding: str) -> None:
    model = tiny_model()
    tokens = tokens_of(2, 8)
    given = torch.ones(2, 8, dtype=torch.int64)
    given[1] = 0
    mask, document_ids = (given, None) if padding == "attention_mask" else (None, given)
    output = model(
        tokens,
        mask,
        document_ids=document_ids,
        positions=torch.tensor([1, 9]),
        labels=torch.tensor([3, 3]),
        loss_weights=torch.tensor([1.0, 0.0]),
    )
    output.loss_sum.backward()
    assert torch.isfinite(output.loss_sum)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_document_ids_keep_documents_apart() -> None:
    """A document sees only itself: its output stays the same if its neighbour changes or is not there."""
    model = tiny_model().double().eval()
    tokens = tokens_of(1, 12)
    document_ids = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    together = model.sharebert(tokens, document_ids=document_ids).hidden
    first_alone = model.sharebert(tokens[:, :5]).hidden
    torch.testing.assert_close(together[:, :5], first_alone)

    changed = tokens.clone()
    changed[:, :5] = tokens_of(1, 5, seed=1)
    changed[:, 9:] = tokens_of(1, 3, seed=1)
    torch.testing.assert_close(model.sharebert(changed, document_ids=document_ids).hidden[:, 5:9], together[:, 5:9])
    assert (model.sharebert(changed).hidden[:, 5:9] - model.sharebert(tokens).hidden[:, 5:9]).abs().max() > 1e-3


def test_pooling_is_made_only_when_asked_for() -> None:
    model = tiny_model()
    encoded = model.sharebert(tokens_of(1, 4), pool=False)
    assert encoded.pooled is None
    torch.testing.assert_close(encoded.hidden, model.sharebert(tokens_of(1, 4)).hidden)


def test_too_long_a_row_is_refused() -> None:
    with pytest.raises(ShareBertError, match="rows of 17 tokens, but the model has 16 positions"):
        tiny_model().sharebert(tokens_of(1, 17))


def test_int32_tokens_are_taken_as_they_are() -> None:
    model = tiny_model().eval()
    tokens = tokens_of(2, 6)
    torch.testing.assert_close(model.sharebert(tokens.int()).hidden, model.sharebert(tokens).hidden)


def test_dropout_follows_the_generator_and_stops_in_evaluation() -> None:
    model = tiny_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    tokens = tokens_of(2, 8)

    def hidden(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.sharebert(tokens).hidden  # type: ignore[no-any-return]

    torch.testing.assert_close(hidden(0), hidden(0), rtol=0, atol=0)
    assert (hidden(0) - hidden(1)).abs().max() > 1e-2
    model.eval()
    torch.testing.assert_close(hidden(0), hidden(1), rtol=0, atol=0)


@pytest.mark.parametrize("key", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_acts(key: str) -> None:
    changes: dict[str, Any] = {key: 0.5}
    model = tiny_model(**changes)
    tokens = tokens_of(2, 8)
    dropped = model.sharebert(tokens).hidden
    assert (dropped - model.eval().sharebert(tokens).hidden).abs().max() > 1e-2


@pytest.mark.parametrize("head", ["untied", "tied"])
@pytest.mark.parametrize("way", ["parameters", "autocast"])
def test_bfloat16_is_near_float32(way: str, head: str) -> None:
    model = tiny_model(mlm_head=head)
    tokens = tokens_of(4, 16)
    positions = torch.arange(0, 64, 3)
    rest = {"positions": positions, "labels": tokens.flatten()[positions], "loss_weights": torch.ones(len(positions))}
    exact = model(tokens, **rest).loss_sum
    exact.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    if way == "parameters":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        output = model(tokens, **rest)
    output.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    assert output.loss_sum.item() == pytest.approx(exact.item(), rel=0.01)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {grad.dtype for grad in ours.values()} == {torch.bfloat16 if way == "parameters" else torch.float32}
    flat, exact_flat = (torch.cat([g[name].float().flatten() for name in gradients]) for g in (ours, gradients))
    assert (flat - exact_flat).norm() / exact_flat.norm() < 0.05


@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_recomputing_changes_memory_and_nothing_else(sharing: str) -> None:
    """The loss and all gradients stay the same, also with dropout; fewer values are kept for the backward pass."""
    model = tiny_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, sharing=sharing)
    tokens = tokens_of(4, 16)
    positions = torch.arange(0, 64, 3)
    rest = {"positions": positions, "labels": tokens.flatten()[positions], "loss_weights": torch.ones(len(positions))}

    def step(recompute: bool) -> tuple[list[Tensor], int]:
        model.sharebert.recompute = recompute
        model.zero_grad()
        kept = 0

        def keep(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(tokens, **rest).loss_sum
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)], kept

    (plain, plain_kept), (again, again_kept) = step(False), step(True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert again_kept < plain_kept / 2
