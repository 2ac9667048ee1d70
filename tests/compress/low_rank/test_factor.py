"""The step `lower_factor`: the oracle is the whole model with E replaced by the product."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import tiny_export, tokens_of
from torch import Tensor

from compress.low_rank.factor import basis, least_squares, mean_hessian
from compress.low_rank.factor_step import LowerFactor
from compress.prune.weights_step import PruneWeights
from compress.source import open_source
from compress.trim import Trim
from exports.dense import Dense
from exports.forms import write_export
from exports.onnx import Onnx
from exports.read import load_model, read_export
from sharebert_common.errors import BadInput


def lowered(folder: Path, size: int, gauge: str = "hessians", **changes: Any) -> tuple[Path, Path]:
    source = tiny_export(folder / "source", **changes)
    tokens = torch.randint(5, 250, (30, 12), generator=torch.Generator().manual_seed(2))
    step, out = LowerFactor(size=size, gauge=gauge), folder / "out"  # type: ignore[arg-type]
    step.check(open_source(source))
    step.apply(open_source(source), SimpleNamespace(calibration=lambda: tokens, seed=0), out)  # type: ignore[arg-type]
    return source, out


@pytest.mark.parametrize("gauge", ["plain", "product", "hessians"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_it_is_the_whole_model_with_the_product_in_place_of_the_embedding(
    tmp_path: Path, gauge: str, head: str
) -> None:
    source, out = lowered(tmp_path, 5, gauge, mlm_head=head)
    whole, small = load_model(source), load_model(out)
    assert (small.config.factor_size, small.config.row_size) == (5, 8)
    tokens = tokens_of(whole.config)
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    with torch.no_grad():
        e, expansion = small.sharebert.word_embeddings.weight, small.sharebert.factor_expansion
        assert expansion is not None
        whole.sharebert.word_embeddings.weight.copy_(e @ expansion.weight.t())
        torch.testing.assert_close(small.logits(tokens, mask), whole.logits(tokens, mask), rtol=1e-4, atol=1e-5)
        pooled = small.sharebert(tokens, mask).pooled
        torch.testing.assert_close(pooled, whole.sharebert(tokens, mask).pooled, rtol=1e-4, atol=1e-5)


def test_the_weighted_product_costs_least() -> None:
    """The oracle: alternating least squares from many starts finds none that costs less."""
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    weights = torch.rand(40, generator=generator, dtype=torch.float64) + 0.1
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    metric = root @ root.t()

    def cost(product: Tensor) -> float:
        error = product - e
        return torch.einsum("v,vf,fg,vg->", weights, error, metric, error).item()

    matrix = basis(e, 3, weights, metric)
    found = cost(least_squares(e, matrix, metric) @ matrix)
    others = []
    for _ in range(5):
        right = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        for _ in range(200):
            left = least_squares(e, right, metric)
            weighted = left.t() * weights
            right = torch.linalg.solve(weighted @ left, weighted @ e)
        others.append(cost(left @ right))
    assert found == pytest.approx(min(others), rel=1e-3)


def test_the_mean_hessian_is_exact_where_all_are_multiples_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator)
    weights = torch.rand(1000, generator=generator)
    hessians = weights[:, None, None] * (root @ root.t())
    a, metric = mean_hessian(lambda rows: hessians[rows], 1000)
    rows = (a - 0.1 * a.mean() / 1.1)[:, None, None] * metric
    torch.testing.assert_close(rows.float(), hessians, rtol=1e-4, atol=1e-5)


def test_without_weights_it_is_the_truncated_svd() -> None:
    e = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projection = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for metric, matrix in ((None, e), (projection.t() @ projection, e @ projection.t())):
        b = basis(e, 3, metric=metric)
        found = least_squares(e, b, metric) @ b
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        expected = (u[:, :3] * s[:3]) @ v[:3]
        torch.testing.assert_close(found if metric is None else found @ projection.t(), expected)


def test_transformers_dense_and_onnx_take_it_after_trimming(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from transformers import AutoModelForMaskedLM

    _, out = lowered(tmp_path, 5, mlm_head="tied")
    Trim().apply(open_source(out), None, tmp_path / "trimmed")  # type: ignore[arg-type]
    tokens = tokens_of(read_export(out).config)
    expected = load_model(out).logits(tokens)
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    for folder in (out, tmp_path / "trimmed"):
        model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
        torch.testing.assert_close(model(tokens).logits, expected, **near)
    write_export(read_export(out), tmp_path / "dense", Dense())
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(stock(tokens).logits, expected, **near)
    write_export(read_export(out), tmp_path / "onnx", Onnx())
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    given = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
    torch.testing.assert_close(torch.from_numpy(session.run(["logits"], given)[0]), expected, **near)


def test_it_can_be_lowered_again_and_trained(tmp_path: Path) -> None:
    _, out = lowered(tmp_path, 6, mlm_head="tied")
    step = LowerFactor(size=3, gauge="product")
    step.apply(open_source(out), None, tmp_path / "again")  # type: ignore[arg-type]
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["factor_size"], config["expanded_size"]) == (3, 8)
    model = load_model(tmp_path / "again").train()
    tokens = tokens_of(model.config)
    positions = torch.arange(4)
    model(tokens, positions=positions, labels=tokens.flatten()[:4], loss_weights=torch.ones(4)).loss_sum.backward()
    assert model.sharebert.factor_expansion is not None
    gradient = model.sharebert.factor_expansion.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (8, {}, "8 is not below the model's factor_size, 8"),
        (3, {"sharing": "eps"}, "this one has eps"),
        (
            3,
            {"intermediate_size": 20, "ffn_pairs": 2},
            "hessians takes a model .* and one feed-forward pair; use product",
        ),
    ],
)
def test_wrong_keys_are_one_line(tmp_path: Path, size: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        LowerFactor(size=size).check(open_source(tiny_export(tmp_path / "source", **changes)))


def test_a_sparse_model_becomes_one_without_a_mask(tmp_path: Path) -> None:
    """No zero of E or W_all is left, so that a bit for each number would only make the file larger."""
    tools: Any = SimpleNamespace(seed=0)
    PruneWeights(method="magnitude").apply(open_source(tiny_export(tmp_path / "whole")), tools, tmp_path / "pruned")
    assert read_export(tmp_path / "pruned").other_keys["sparse"]
    LowerFactor(size=4, gauge="plain").apply(open_source(tmp_path / "pruned"), tools, tmp_path / "out")
    assert "sparse" not in read_export(tmp_path / "out").other_keys
