"""The step `low_rank`: the oracle is the whole model with the products written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import tiny_export, tokens_of

from compress.low_rank.step import LowRankStep
from compress.low_rank.svd import truncated
from compress.source import open_source
from compress.trim import Trim
from exports.dense import Dense
from exports.forms import write_export
from exports.onnx import Onnx
from exports.read import load_model, read_export
from pretrain.flops import generated_elements
from sharebert import ShareBertConfig, ShareBertForMaskedLM
from sharebert.config import ShareBertError
from sharebert_common.errors import BadInput

RANKS = {"query": 3, "value": 9, "*output": 7}
PRUNED: dict[str, Any] = {"kept_heads": (0, 2), "kept_columns": tuple(range(0, 40, 2))}


def low_rank(
    folder: Path, rank: int, calibrated: bool = True, ranks: dict[str, int] | None = None, **changes: Any
) -> tuple[Path, Path]:
    source = tiny_export(folder / "source", **changes)
    tokens = torch.randint(5, 250, (30, 12), generator=torch.Generator().manual_seed(2))
    step, out = LowRankStep(rank=rank, ranks=ranks or {}, calibrated=calibrated), folder / "out"
    step.check(open_source(source))
    step.apply(open_source(source), SimpleNamespace(calibration=lambda: tokens, seed=0), out)  # type: ignore[arg-type]
    return source, out


def written_out(model: ShareBertForMaskedLM) -> ShareBertForMaskedLM:
    """The same model with `sharing: layers`, and a·b as its matrices."""
    plain = ShareBertForMaskedLM(dataclasses.replace(model.config, sharing="layers", rank=None, ranks=None))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".sharing." not in name}
    own = model.state_dict()
    for name in ("query", "key", "value", "attention_output", "intermediate", "output", "pooler"):
        place = "pooler" if name == "pooler" else f"layers.0.{name}"
        pair = (own[f"sharebert.sharing.{name}_{half}"] for half in "ab")
        tensors[f"sharebert.sharing.{place}"] = torch.matmul(*pair)
    plain.load_state_dict(tensors)
    return plain.eval()


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(("sharing", "ranks"), [("veps", {}), ("layers", {}), ("veps", RANKS)])
def test_it_computes_what_the_products_compute(
    tmp_path: Path, calibrated: bool, sharing: str, ranks: dict[str, int]
) -> None:
    _, out = low_rank(tmp_path, 5, calibrated, ranks, sharing=sharing)
    model = load_model(out)
    assert not [name for name, _ in model.named_parameters() if "factor_linear_all" in name]
    tokens = tokens_of(model.config)
    expected = written_out(model)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(model.logits(tokens), expected.logits(tokens), rtol=1e-4, atol=1e-5)
            found = model.sharebert(tokens).pooled
            torch.testing.assert_close(found, expected.sharebert(tokens).pooled, rtol=1e-4, atol=1e-5)


def test_each_matrix_has_its_rank(tmp_path: Path) -> None:
    """In shapes, parameters, FLOPs and the card; the product of each is the nearest of that rank."""
    source, out = low_rank(tmp_path, 5, calibrated=False, ranks=RANKS)
    expected = {"query": 3, "key": 5, "value": 9, "attention_output": 7, "intermediate": 5, "output": 7, "pooler": 5}
    config, model, encoder = read_export(out).config, load_model(out), load_model(source).sharebert
    assert config.ranks == {"query": 3, "value": 9, "attention_output": 7, "output": 7}
    assert {name: config.rank_of(name) for name in expected} == expected
    made = encoder.layer_weights()
    for name, matrix in {**made.of_layer(0)._asdict(), "pooler": made.pooler}.items():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        found = model.sharebert.sharing.matrix(name)  # type: ignore[attr-defined]
        assert (found.a.shape[1], found.b.shape[0]) == (expected[name],) * 2
        nearest = (u * s)[:, : expected[name]] @ v[: expected[name]]
        torch.testing.assert_close(found.a @ found.b, nearest, rtol=1e-4, atol=1e-5)
    by_hand = 3 * 48 + 5 * 48 + 9 * 48 + 7 * 48 + 5 * 64 + 7 * 64
    assert generated_elements(config) == by_hand
    factors = [p.numel() for name, p in model.named_parameters() if ".sharing." in name]
    assert sum(factors) == by_hand + 5 * 48
    assert "5, 3 of query, 9 of value, 7 of attention_output, 7 of output" in (out / "README.md").read_text()


def test_of_a_pruned_model_the_rest_is_factored(tmp_path: Path) -> None:
    """With 2 of 3 heads and 20 of 40 columns; rank 23 is that of each matrix which is left, so that nothing is lost."""
    source, out = low_rank(tmp_path, 23, **PRUNED)
    config, model = read_export(out).config, load_model(out)
    assert (config.heads, config.intermediate_size, config.kept_columns) == (2, 20, None)
    assert [config.rank_of(name) for name in ("query", "attention_output", "intermediate", "output")] == [
        16,
        16,
        20,
        20,
    ]
    assert generated_elements(config) == 4 * 16 * (24 + 16) + 2 * 20 * (24 + 20)
    assert not [name for name in model.state_dict() if "kept_" in name]
    tokens = tokens_of(config)
    torch.testing.assert_close(model.logits(tokens), load_model(source).logits(tokens), rtol=1e-3, atol=1e-4)


def test_a_pruned_model_of_low_rank_is_an_export_like_others(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    _, out = low_rank(tmp_path, 5, ranks=RANKS, **PRUNED)
    Trim().apply(open_source(out), None, tmp_path / "trimmed")  # type: ignore[arg-type]
    tokens = tokens_of(read_export(out).config)
    expected = load_model(out).logits(tokens)
    torch.testing.assert_close(load_model(tmp_path / "trimmed").logits(tokens), expected, rtol=1e-4, atol=1e-4)
    model = AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True).eval()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_at_almost_full_rank_little_is_lost(tmp_path: Path) -> None:
    source, out = low_rank(tmp_path, 23)
    tokens = tokens_of(read_export(out).config)
    expected, found = load_model(source).logits(tokens), load_model(out).logits(tokens)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_product_is_nearest_on_what_the_matrix_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator) * torch.arange(1.0, 9)
    w = torch.randn(8, 6, generator=generator)
    product, plain = truncated(w, 3, x.t() @ x), truncated(w, 3)
    u, s, v = torch.linalg.svd(x @ w, full_matrices=False)
    torch.testing.assert_close(x @ product.a @ product.b, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-3, atol=1e-3)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(plain.a @ plain.b, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4, atol=1e-5)
    assert truncated(w, 99).a.shape == (8, 6)


def test_gradients_are_those_of_the_written_out_products(tmp_path: Path) -> None:
    _, out = low_rank(tmp_path, 4)
    model = load_model(out).train()
    tokens = tokens_of(model.config)
    model.logits(tokens).square().sum().backward()
    own, expected = model.sharebert.sharing, written_out(model).train()
    expected.logits(tokens).square().sum().backward()
    full = expected.sharebert.sharing.layers[0].intermediate.grad  # type: ignore[attr-defined]
    by_hand = full @ own.intermediate_b.t()  # type: ignore[attr-defined]
    torch.testing.assert_close(own.intermediate_a.grad, by_hand, rtol=1e-3, atol=1e-3)  # type: ignore[attr-defined]


def test_transformers_trim_and_dense_take_it(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    _, out = low_rank(tmp_path, 6, ranks=RANKS)
    Trim().apply(open_source(out), None, tmp_path / "trimmed")  # type: ignore[arg-type]
    tokens = tokens_of(read_export(out).config)
    expected = load_model(out).logits(tokens)
    for folder in (out, tmp_path / "trimmed"):
        model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    write_export(read_export(out), tmp_path / "dense", Dense())
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(stock(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, PRUNED])
def test_the_onnx_file_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    _, out = low_rank(tmp_path, 6, ranks=RANKS, **changes)
    write_export(read_export(out), tmp_path / "onnx", Onnx())
    tokens = tokens_of(read_export(out).config)
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": tokens.ne(0).long().numpy()})
    torch.testing.assert_close(torch.tensor(found), load_model(out).logits(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"valeu": 3}, "low_rank.ranks: no matrix of this model has a name like 'valeu'; one is query; did you mean"),
        ({"query": 4, "*e*": 24}, r"low_rank.ranks: \*e\*: 24 is not below the width of key, 24"),
    ],
)
def test_wrong_ranks_are_one_line(tmp_path: Path, ranks: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        LowRankStep(rank=4, ranks=ranks).check(open_source(tiny_export(tmp_path / "source")))


@pytest.mark.parametrize(
    ("rank", "changes", "message"),
    [
        (24, {}, "low_rank.rank: 24 is not below the hidden size, 24"),
        (4, {"sharing": "none"}, "this one has none"),
        (4, {"sharing": "eps"}, "takes sharing: veps or layers"),
        (4, {"intermediate_size": 20, "ffn_pairs": 2}, "takes a model with one feed-forward pair"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path: Path, rank: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        LowRankStep(rank=rank).check(open_source(tiny_export(tmp_path / "source", **changes)))


@pytest.mark.parametrize("keys", [{"rank": 4}, {"sharing": "low_rank"}, {"sharing": "low_rank", "rank": 0}])
def test_a_rank_and_the_sharing_belong_together(keys: dict[str, Any]) -> None:
    with pytest.raises(ShareBertError, match="rank"):
        ShareBertConfig(vocab_size=250, hidden_size=24, intermediate_size=40, factor_size=8, num_attention_heads=3,
                        **keys)  # fmt: skip
