"""The closed-form cost of an error of the factors, against the error itself; and GPTQ against rounding."""

from __future__ import annotations

import pytest
import torch
from compress_models import tokens_of
from tiny_models import tiny_model

from compress.quantise.hessians import collect, element_costs, of_embedding, of_projection
from compress.quantise.rounding import gptq
from exports.rounding import to_nearest
from sharebert.packed import Packing
from sharebert.sharing import OneGeneratedSet
from sharebert.virtual import blocks


def test_the_cost_of_an_element_is_the_square_of_its_input() -> None:
    model = tiny_model().eval()
    tokens = tokens_of(model.config, rows=4)
    statistics = collect(model, tokens, tokens > 0)
    costs = element_costs(model.config, statistics, slice(None))
    assert costs.shape == (model.config.vocab_size, model.config.hidden_size)
    for name, block in blocks(model.config).items():
        if name == "pooler":
            continue
        flat = costs[:, block.first : block.last].reshape(-1)[: block.rows * block.columns]
        expected = statistics.squares[name][:, None].expand(block.rows, block.columns)
        torch.testing.assert_close(flat.view(block.rows, block.columns), expected)


def test_inputs_are_those_of_a_transcription() -> None:
    """The query's input is the output of the attention norm, summed over layers."""
    model = tiny_model().eval()
    tokens = tokens_of(model.config, rows=4)
    seen = torch.zeros(model.config.hidden_size, dtype=torch.float64)

    def watch(module: object, given: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        seen.add_((output[1].double() ** 2).sum((0, 1)))

    for layer in model.sharebert.layers:
        layer.attention_norm.register_forward_hook(watch)
    statistics = collect(model, tokens, tokens > 0)
    torch.testing.assert_close(statistics.squares["query"].double(), seen / tokens.numel(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_padding_does_not_count(head: str) -> None:
    """Rows with padding say what the same rows say without it, whatever rows they are in a batch with."""
    model = tiny_model(mlm_head=head).eval()
    tokens = tokens_of(model.config, rows=5)
    padded = torch.nn.functional.pad(tokens, (0, 6))
    expected, found = (collect(model, rows, rows != 0, rows_at_once=2) for rows in (tokens, padded))
    for name, squares in expected.squares.items():
        torch.testing.assert_close(found.squares[name], squares, rtol=1e-4, atol=1e-6)
    assert found.counts.equal(expected.counts)
    assert found.counts[0] == 0
    assert (found.heads is None) == (head == "untied")
    if expected.heads is not None:
        torch.testing.assert_close(found.heads, expected.heads, rtol=1e-4, atol=1e-6)


def test_an_error_of_the_embedding_costs_what_the_form_says() -> None:
    """Without the path of the looked-up word: Σ over the generated matrices of a(i)·error²."""
    model = tiny_model().eval()
    tokens = tokens_of(model.config)
    statistics = collect(model, tokens, tokens > 0)
    statistics = statistics._replace(counts=torch.zeros_like(statistics.counts))
    weight = model.sharebert.factor_linear_all.weight.detach()
    hessians = of_embedding(model, statistics, weight)(slice(0, 9)).double()
    error = torch.randn(9, model.config.factor_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.einsum("vf,vfg,vg->", error, hessians, error)
    with torch.no_grad():
        before = OneGeneratedSet(model.config)(model.sharebert, pooler=False).weights
        model.sharebert.word_embeddings.weight[:9] += error.float()
        after = OneGeneratedSet(model.config)(model.sharebert, pooler=False).weights
    expected = sum(
        (statistics.squares[name][:, None] * (a - b) ** 2).sum()
        for name, a, b in zip(before._fields, before, after, strict=True)
    )
    torch.testing.assert_close(found.float(), torch.as_tensor(expected), rtol=1e-3, atol=1e-5)


def test_gptq_beats_rounding_where_columns_go_together() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 16, generator=generator)
    x = torch.randn(500, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    hessian = (x.t() @ x / 500).expand(30, 16, 16)
    packing = Packing((30, 16), 3)
    costs = []
    for rounded in (
        to_nearest(matrix, packing),
        gptq(matrix, packing, lambda rows: hessian[rows], None, rows_at_once=7),
    ):
        error = rounded.values(packing) - matrix
        costs.append(float(torch.einsum("vf,vfg,vg->", error, hessian, error)))
    assert costs[1] < 0.7 * costs[0]


def test_the_hessian_of_the_projection_is_the_weighted_gram_of_the_embedding() -> None:
    model = tiny_model().eval()
    tokens = tokens_of(model.config)
    statistics = collect(model, tokens, tokens > 0)
    e = model.sharebert.word_embeddings.weight.detach()
    costs = element_costs(model.config, statistics, slice(None))
    row = model.config.hidden_size - 1
    expected = e.t() @ torch.diag(costs[:, row]) @ e
    torch.testing.assert_close(of_projection(model, statistics, e)(slice(row, row + 1))[0], expected)
