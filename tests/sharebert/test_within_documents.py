"""Attention within documents: a packed row gives the same loss as rows of one document each."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from pretrain.data.batches import MicroBatch
from pretrain.objective import MaskedLanguageModelling
from sharebert import ShareBertError, kernels

DOCUMENT_IDS = torch.tensor([[1] * 5 + [2] * 7 + [3] * 4, [1] * 2 + [2] * 11 + [0] * 3])


def batch() -> dict[str, Tensor]:
    """Two rows; every position that is not padding is predicted."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(5, 250, (2, 2, 16), generator=generator).unbind()
    positions = DOCUMENT_IDS.flatten().nonzero().flatten()
    return {"tokens": tokens, "positions": positions, "labels": labels.flatten()[positions]}


def one_document_a_row(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each document in its own row, at the same positions, with padding around it."""
    places = [(row, number) for row in range(2) for number in DOCUMENT_IDS[row].unique().tolist() if number]
    mask = torch.stack([DOCUMENT_IDS[row] == number for row, number in places])
    rows = torch.tensor([row for row, _ in places])
    labels = torch.zeros(2 * 16, dtype=torch.int64).index_put((packed["positions"],), packed["labels"]).view(2, 16)
    positions = mask.flatten().nonzero().flatten()
    return {
        "tokens": packed["tokens"][rows] * mask,
        "attention_mask": mask,
        "positions": positions,
        "labels": labels[rows].flatten()[positions],
    }


def test_a_packed_row_gives_the_loss_of_one_document_a_row() -> None:
    model = tiny_model().double()
    packed = batch()
    apart = one_document_a_row(packed)
    weights = torch.ones(len(packed["positions"]))
    parameters = list(model.parameters())
    together = model(**packed, document_ids=DOCUMENT_IDS, loss_weights=weights).loss_sum
    alone = model(**apart, loss_weights=weights).loss_sum
    blended = model(**packed, attention_mask=DOCUMENT_IDS, loss_weights=weights).loss_sum
    ours = torch.autograd.grad(together, parameters, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(alone, parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(together, alone)
    assert (blended - alone).abs() > 1e-2
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-9 * (b.norm() + 1e-3), name


def test_training_passes_the_document_ids() -> None:
    """The objective's loss of a micro-batch is that of one document a row."""
    model = tiny_model().double()
    packed = batch()
    weights = torch.ones(len(packed["positions"]))
    micro = MicroBatch(**packed, document_ids=DOCUMENT_IDS.to(torch.uint8), loss_weights=weights, padded=True)

    def loss(within: bool) -> Tensor:
        return MaskedLanguageModelling(torch.device("cpu"), within_documents=within)(model, micro).loss

    torch.testing.assert_close(loss(True), model(**one_document_a_row(packed), loss_weights=weights).loss_sum)
    torch.testing.assert_close(loss(False), model(**packed, attention_mask=DOCUMENT_IDS, loss_weights=weights).loss_sum)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that CUDA takes, here not compiled; only the forward pass, because on a CPU it has no backward."""
    model = tiny_model()
    packed = batch()
    with torch.no_grad():
        expected = model.logits(packed["tokens"], DOCUMENT_IDS, document_ids=DOCUMENT_IDS)
        monkeypatch.setattr(kernels, "flex_serves", lambda *_: True)
        made = model.logits(packed["tokens"], DOCUMENT_IDS, document_ids=DOCUMENT_IDS)
    torch.testing.assert_close(made[DOCUMENT_IDS > 0], expected[DOCUMENT_IDS > 0], rtol=1e-4, atol=1e-4)


def test_flex_attention_refuses_dropout_on_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flex_serves", lambda *_: True)
    model = tiny_model(attention_probs_dropout_prob=0.1)
    with pytest.raises(ShareBertError, match=r"attention_probs_dropout_prob: 0\.1, but .* set it to 0"):
        model.logits(batch()["tokens"], document_ids=DOCUMENT_IDS)
