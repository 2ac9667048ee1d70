"""Quantisation-aware training: the forward pass of rounded weights, and the export that has exactly those codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_runs import losses, train_arguments, train_many
from torch import Tensor

from compress.quantise.step import Quantise
from compress.step import Source
from exports.fake_quantise import QuantiseRecipe, with_learned_scales
from exports.packed import is_matrix
from exports.read import load_model
from exports.rounding import to_nearest
from exports.weight_files import read_weights
from pretrain.engine.fake_quantise import FakeQuantisedForMaskedLM
from pretrain.export.consolidate import consolidate
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertForMaskedLM
from sharebert.packed import Packing, unpack_bits
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

BATCH = {
    "tokens": torch.randint(5, 250, (4, 16), generator=torch.Generator().manual_seed(0)),
    "positions": torch.arange(0, 64, 7),
    "labels": torch.arange(5, 15),
    "loss_weights": torch.ones(10),
}


def by_hand(matrix: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The asymmetric scheme, a group after the other."""
    found = np.empty_like(matrix)
    for row in range(len(matrix)):
        for first in range(0, matrix.shape[1], group):
            part = matrix[row, first : first + group]
            scale = np.float32(np.float16((part.max() - part.min()) / (2**bits - 1)))
            offset = np.float32(np.float16(part.min()))
            found[row, first : first + group] = (
                np.clip(np.round((part - offset) / scale), 0, 2**bits - 1) * scale + offset
            )
    return found


def fake(plain: ShareBertForMaskedLM, **keys: Any) -> FakeQuantisedForMaskedLM:
    model = FakeQuantisedForMaskedLM(plain.config, QuantiseRecipe(**keys))
    model.load_state_dict(plain.state_dict())  # the same names, and nothing beside them
    return model


def loss_and_gradients(model: ShareBertForMaskedLM) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**BATCH).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("sharing", ["veps", "eps", "layers", "none"])
def test_loss_and_gradients_are_those_of_the_rounded_weights(head: str, sharing: str) -> None:
    plain = tiny_model(mlm_head=head, sharing=sharing)
    model = fake(plain, bits=4, small_bits=6, group=5)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if is_matrix(name):
                bits = 4 if "word_embeddings" in name or "decoder" in name else 6
                parameter.copy_(torch.from_numpy(by_hand(parameter.numpy(), bits, 5)))
    expected, its_gradients = loss_and_gradients(plain)
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == its_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, its_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_bf16_weights_are_rounded_in_fp32() -> None:
    model = fake(tiny_model(), bits=4).bfloat16()
    found = model.rounded()["sharebert.word_embeddings.weight"]
    weight = model.sharebert.word_embeddings.weight.detach().float()
    expected = torch.from_numpy(by_hand(weight.numpy(), 4, weight.shape[1])).bfloat16()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_zero_3_is_refused(dataset: Path, tmp_path: Path) -> None:
    recipe = load(TrainRecipe, None, train_arguments(dataset, tmp_path / "run", quantise=4, zero__stage=3))
    with pytest.raises(BadInput, match=r"quantise: not with zero\.stage 3"):
        recipe.resolve()


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    keys = {"quantise__bits": 3, "quantise__small_bits": 5, "quantise__group": 3, "steps": 12, "checkpoint__every": 5}
    plan = [
        {"overrides": train_arguments(dataset, folder / "zero-1", **keys)},
        {"overrides": train_arguments(dataset, folder / "zero-2", **keys, zero__stage=2)},
        {"overrides": train_arguments(dataset, folder / "zero-0", **keys, zero__stage=0)},
        {"overrides": train_arguments(dataset, folder / "resumed", **keys), "copy": [str(folder / "zero-1"), 5]},
        {"overrides": train_arguments(dataset, folder / "plain", steps=12)},
    ]
    train_many(plan, 2, folder)
    return folder


def test_any_zero_stage_and_a_resumed_run_have_the_same_losses(runs: Path) -> None:
    expected = losses(runs / "zero-1")
    for name in ("zero-2", "zero-0"):
        np.testing.assert_allclose(losses(runs / name), expected, rtol=2e-4)
    assert losses(runs / "resumed")[-7:] == expected[-7:]
    assert abs(losses(runs / "plain")[0] / expected[0] - 1) > 1e-5  # rounding does something


def test_the_step_quantise_makes_the_codes_of_the_training(runs: Path, tmp_path: Path) -> None:
    consolidate(runs / "zero-1", tmp_path / "export")
    plain = load_model(tmp_path / "export")
    training = fake(plain, bits=3, small_bits=5, group=3)
    step = Quantise(bits=3, small_bits=5, group=3, rounding="nearest")
    step.apply(Source(tmp_path / "export", "compact"), None, tmp_path / "packed")  # type: ignore[arg-type]
    packed = load_model(tmp_path / "packed").state_dict()
    stored = read_weights(tmp_path / "packed")
    for name, rounded in training.rounded().items():
        torch.testing.assert_close(packed[name], rounded.detach(), rtol=0, atol=0, msg=name)
        bits = 3 if "word_embeddings" in name else 5
        codes = unpack_bits(stored[f"{name}.codes"], bits, rounded.numel())
        assert 2 < len(codes.unique()) <= 2**bits


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "midpoint"])
def test_learned_scales_have_the_values_of_the_range(scheme: Any) -> None:
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(3))
    for group in (-1, 0, 5, 8):
        packing = Packing((6, 20), 3, scheme, group)
        expected = to_nearest(matrix, packing).values(packing)
        assert with_learned_scales(matrix, packing).equal(expected)


def test_gradients_of_learned_scales_are_lsqs() -> None:
    """∂ŵ/∂s = code − w/s goes to the ends of the range, scaled by 1/√(N·Q); the others have that of the identity."""
    row = torch.tensor([[0.3, -1.1, 0.52, 2.0, -0.4, 0.07]], requires_grad=True)
    upstream = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.25, -1.0]])
    (with_learned_scales(row, Packing((1, 6), 3, "asymmetric")) * upstream).sum().backward()
    w, c = row.detach().numpy()[0].astype(np.float64), upstream.numpy()[0]
    s, low = float(np.float16(3.1 / 7)), float(np.float16(-1.1))
    places = (w - low) / s
    of_scale = float((c * (np.round(places) - places)).sum()) / np.sqrt(6 * 7)
    expected = c.astype(np.float64)
    expected[3] += of_scale / 7
    expected[1] -= of_scale / 7
    assert row.grad is not None
    np.testing.assert_allclose(row.grad[0], expected, rtol=1e-4)
    assert abs(of_scale) > 0.03
