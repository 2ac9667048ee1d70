"""The MLM head: its loss is that of its logits, and only the parameters that it reads get a gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

from sharebert import ShareBertError

TOKENS = torch.randint(250, (3, 10), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([1, 4, 17, 29, 0, 0])
LABELS = torch.tensor([7, 8, 9, 10, 0, 0])
WEIGHTS = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_loss_is_the_cross_entropy_of_the_logits(head: str) -> None:
    model = tiny_model(mlm_head=head).double()
    everywhere = model.logits(TOKENS)
    assert everywhere.shape == (3, 10, 256)
    chosen = model.logits(TOKENS, positions=POSITIONS)
    torch.testing.assert_close(chosen, everywhere.flatten(0, 1)[POSITIONS])

    labels = LABELS.clone()
    labels[2] = chosen[2].argmax()
    output = model(TOKENS, positions=POSITIONS, labels=labels, loss_weights=WEIGHTS)
    each = F.cross_entropy(chosen, labels, reduction="none")
    torch.testing.assert_close(output.loss_sum, (each * WEIGHTS).sum())
    assert output.correct.item() == 0.5


def test_pooler_bias_takes_no_gradient_and_everything_else_does() -> None:
    for head in ("untied", "tied"):
        model = tiny_model(mlm_head=head)
        model(TOKENS, positions=POSITIONS, labels=LABELS, loss_weights=WEIGHTS).loss_sum.backward()
        assert {name for name, p in model.named_parameters() if p.grad is None} == {"sharebert.pooler_bias"}


def test_parameter_names_and_shapes() -> None:
    names = {name: tuple(p.shape) for name, p in tiny_model().named_parameters() if not name.startswith("sharebert")}
    assert names == {
        "mlm_head.dense.weight": (24, 24),
        "mlm_head.dense.bias": (24,),
        "mlm_head.norm.weight": (24,),
        "mlm_head.norm.bias": (24,),
        "mlm_head.decoder.weight": (256, 24),
    }
    tied = {name: tuple(p.shape) for name, p in tiny_model(mlm_head="tied").named_parameters() if "mlm_head" in name}
    assert tied == {
        "mlm_head.dense.weight": (8, 24),
        "mlm_head.dense.bias": (8,),
        "mlm_head.norm.weight": (8,),
        "mlm_head.norm.bias": (8,),
        "mlm_head.bias": (256,),
    }


def test_model_without_head_says_so() -> None:
    model = tiny_model(mlm_head="none")
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"sharebert"}
    with pytest.raises(ShareBertError, match="no MLM head"):
        model.logits(TOKENS)
    with pytest.raises(ShareBertError, match="no MLM head"):
        model(TOKENS, positions=POSITIONS, labels=LABELS, loss_weights=WEIGHTS)
