"""torch.compile as an option: the same numbers, and no recompilation after the first steps."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from pretrain.model import compile_layers
from sharebert import ShareBertForMaskedLM

ROWS, LENGTH = 4, 16


def batch(seed: int) -> dict[str, Tensor]:
    """A micro-batch of fixed shape, with more or less padding, as the trainer hands it on."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 250, (ROWS, LENGTH), generator=generator)
    document_ids = torch.ones(ROWS, LENGTH, dtype=torch.uint8)
    document_ids[0, LENGTH - seed :] = 0
    positions = torch.randperm(ROWS * LENGTH - LENGTH, generator=generator)[:9] + LENGTH
    labels = tokens.flatten()[positions]
    return {
        "tokens": tokens,
        "attention_mask": document_ids,
        "positions": positions,
        "labels": labels,
        "loss_weights": torch.ones(9),
    }


def step(model: ShareBertForMaskedLM, seed: int) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**batch(seed)).loss_sum
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def clean_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("clean_dynamo")
def test_compiled_layers_give_the_same_and_are_compiled_once() -> None:
    """Without a code generator behind it: what is traced, and when, does not depend on one."""
    plain, compiled = tiny_model(), tiny_model()
    compile_layers(compiled, backend="aot_eager")
    for seed in range(2):  # training and evaluation are the graphs that a run has
        step(compiled, seed)
    compiled.eval()
    with torch.no_grad():
        compiled(**batch(0))
    compiled.train()
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(6):
            (loss, gradients), (expected, exact) = step(compiled, seed), step(plain, seed)
            torch.testing.assert_close(loss, expected)
            for a, b in zip(gradients, exact, strict=True):
                torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
