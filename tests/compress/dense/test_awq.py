"""AWQ against its formulas, written by hand in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.dense.awq import Group, best_clip, best_scales, rounded, scales_of


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [64, 32] with some loud channels, and a matrix [24, 32]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 32, generator=generator) * torch.linspace(0.05, 4, 32).square()
    return x, torch.randn(24, 32, generator=generator)


def by_hand(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Each group of a row: step = range / levels, zero = round(-min / step)."""
    out = np.empty_like(w)
    for row in range(w.shape[0]):
        for first in range(0, w.shape[1], group):
            part = w[row, first : first + group]
            step = max(part.max() - part.min(), 1e-5) / (2**bits - 1)
            zero = np.clip(np.round(-part.min() / step), 0, 2**bits - 1)
            codes = np.clip(np.round(part / step) + zero, 0, 2**bits - 1)
            out[row, first : first + group] = (codes - zero) * step
    return out


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, 32)])
def test_rounding(bits: int, group: int) -> None:
    _, w = layer()
    np.testing.assert_allclose(rounded(w, bits, group).numpy(), by_hand(w.numpy(), bits, group), atol=1e-5)
    assert len(np.unique(rounded(w, bits, 32)[0].numpy().round(5))) <= 2**bits


def test_the_scales_of_a_layer_are_those_of_the_formula() -> None:
    """llm-awq's: s = mean|x|^α / √(max·min), α from 0, 0.05, …, 0.95 by the least squared error of the products."""
    inputs, weight = layer()
    x, w = inputs.double().numpy(), weight.double().numpy()
    errors = {}
    for step in range(20):
        s = np.maximum(np.maximum(np.abs(x).mean(0), 1e-4) ** (step / 20), 1e-4)
        s /= np.sqrt(s.max() * s.min())
        errors[step / 20] = ((x @ w.T - (x / s) @ by_hand(w * s, 4, 8).T) ** 2).sum(), s
    alpha = min(errors, key=lambda a: errors[a][0])
    ours, found = best_scales(Group([inputs.double()], [weight.double()]), 4, 8)
    assert found == alpha > 0
    np.testing.assert_allclose(ours.numpy(), errors[alpha][1], rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_beats_plain_rounding_on_other_inputs(seed: int) -> None:
    x, w = layer(seed)
    fresh = torch.randn(256, 32) * torch.linspace(0.05, 4, 32).square()
    s, _ = best_scales(Group([x], [w]), 3, 32)
    clip = best_clip([x / s], w * s, 3, 32)
    errors = [
        (fresh @ (w - approximate).t()).square().sum()
        for approximate in (rounded(w, 3, 32), rounded(w * s, 3, 32) / s, rounded(w * s, 3, 32, clip) / s)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_layers_that_share_a_matrix_get_one_scale() -> None:
    """It is that of all their inputs together."""
    (a, w), (b, _) = layer(0), layer(1)
    together, alpha = best_scales(Group([a, b], [w]), 4, 8)
    joined, same = best_scales(Group([torch.cat([a, b])], [w]), 4, 8)
    assert alpha == same
    torch.testing.assert_close(together, joined)
    torch.testing.assert_close(together, scales_of(torch.cat([a, b]).abs().mean(0), alpha))


def test_clipping_never_raises_the_error_of_what_it_saw() -> None:
    x, w = layer()
    w[:, 5] *= 8  # one outlier in each row widens the range of all
    clip = best_clip([x[:, :]], w, 3, 32)
    assert clip.min() >= 0.5
    errors = [(x @ (w - rounded(w, 3, 32, factor)).t()).square().sum() for factor in (None, clip)]
    assert errors[1] <= errors[0]
