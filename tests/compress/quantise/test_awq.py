"""Factors of columns: the published formula, the best of its grid, and the file that holds them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from compress.quantise.awq import GRID, column_factors, factors, scaled_to_nearest
from compress.quantise.step import EMBEDDING, PROJECTION, Quantise
from compress.step import Source
from exports.export import Export
from exports.forms import write_export
from exports.kinds import MaskedLM
from exports.read import load_model
from exports.weight_files import read_weights
from exports.weight_source import TensorWeights
from sharebert.packed import Packing, unpack_bits
from sharebert_common.errors import BadInput


def by_hand(matrix: np.ndarray, bits: int) -> np.ndarray:
    """Asymmetric, a scale a row."""
    low, high = matrix.min(1, keepdims=True), matrix.max(1, keepdims=True)
    scale = np.float32(np.float16((high - low) / (2**bits - 1)))
    offset = np.float32(np.float16(low))
    return np.clip(np.round((matrix - offset) / scale), 0, 2**bits - 1) * scale + offset


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.95])
def test_factors_are_those_of_the_paper(alpha: float) -> None:
    importance = np.random.default_rng(0).uniform(0.1, 3, 11).astype(np.float32)
    s = importance**alpha
    s /= np.sqrt(s.max() * s.min())
    np.testing.assert_allclose(factors(torch.from_numpy(importance), alpha), 1 / s, rtol=1e-3)


def test_the_best_of_the_grid_is_taken() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(40, 8, generator=generator)
    costs = torch.rand(40, 8, generator=generator) * torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 0.01])
    found = column_factors(matrix, Packing((40, 8), 3), costs)
    importance, w, c = costs.mean(0).sqrt(), matrix.numpy(), costs.numpy()
    errors = []
    for step in range(GRID):
        columns = factors(importance, step / GRID).float().numpy()
        errors.append(float((((by_hand(w / columns, 3) * columns - w) ** 2) * c).sum()))
    mine = float(((scaled_to_nearest(matrix, Packing((40, 8), 3), found) - matrix) ** 2 * costs).sum())
    assert mine == pytest.approx(min(errors), rel=1e-3)
    assert mine < 0.9 * errors[0], "the first is plain rounding"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    model = tiny_model(mlm_head="tied")
    tokenizer = tiny_tokenizer(tmp_path)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_export(Export(model.config, MaskedLM(), TensorWeights(weights), tokenizer), tmp_path / "export")
    return tmp_path / "export"


def tools() -> Any:
    tokens = torch.randint(5, 250, (16, 16), generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(seed=0, calibration=lambda: tokens)


def test_the_file_holds_what_the_model_uses(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    Quantise(bits=4, awq=True, centre=True, rounding="nearest").apply(Source(export, "compact"), tools(), out)
    stored: dict[str, Tensor] = read_weights(out)
    loaded = load_model(out).state_dict()
    for name in (EMBEDDING, PROJECTION):
        matrix = loaded[name].numpy()
        codes = unpack_bits(stored[f"{name}.codes"], 4, matrix.size).numpy().reshape(matrix.shape)
        scales, offsets, columns = (
            stored[f"{name}.{part}"].numpy().astype(np.float32) for part in ("scales", "offsets", "columns")
        )
        expected = (codes * scales + offsets) * columns
        if name == EMBEDDING:
            expected = expected + stored[f"{name}.mean"].numpy().astype(np.float32)
        np.testing.assert_allclose(matrix, expected, rtol=1e-6, atol=1e-7)
        assert len(np.unique(columns)) > 1, "the scales are used"


def test_what_weighs_errors_itself_is_refused(export: Path) -> None:
    for keys in ({"rounding": "gptq"}, {"rotate": True}):
        with pytest.raises(BadInput, match=r"quantise\.awq: not with rotate"):
            Quantise(awq=True, **keys).check(Source(export, "compact"))  # type: ignore[arg-type]
