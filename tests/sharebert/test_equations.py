"""The model against an independent and deliberately naive transcription of its equations.

The transcription makes the whole virtual matrix, and loops over rows, heads and positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import PATHS, kernels_of
from tiny_models import tiny_model
from torch import Tensor

from sharebert import ShareBertConfig, ShareBertForMaskedLM


def layer_norm(x: Tensor, p: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def cut(matrix: Tensor, right: int, width: int, rows: int, columns: int) -> Tensor:
    """Columns of M that end `right` from the right edge, `width` of them, as a [rows, columns] weight."""
    h = matrix.shape[1]
    block = matrix[:, h - right - width : h - right]
    return torch.cat(list(block))[: rows * columns].reshape(rows, columns)


def naive(
    c: ShareBertConfig, p: Mapping[str, Tensor], tokens: Tensor, mask: Tensor, types: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, T, H], pooled [B, H] and logits [B, T, V]."""
    e = p["sharebert.word_embeddings.weight"]
    veps = c.sharing == "veps"
    m = e @ p["sharebert.factor_linear_all.weight"].T + p["sharebert.factor_linear_all.bias"] if veps else e
    big_h, big_i = c.hidden_size, c.intermediate_size
    h, f = math.ceil(big_h**2 / len(e)), math.ceil(big_h * big_i / len(e))
    w_query = cut(m, 0, h, big_h, big_h)
    w_key = cut(m, h, h, big_h, big_h)
    w_value = cut(m, 2 * h, h, big_h, big_h)
    pairs = [(cut(m, 3 * h, f, big_h, big_i), cut(m, f + 3 * h, f, big_i, big_h))]
    w_attention = cut(m, 2 * f + 3 * h, h, big_h, big_h)
    for number in range(1, c.ffn_pairs):
        right = 4 * h + 2 * f * number
        pairs.append((cut(m, right, f, big_h, big_i), cut(m, right + f, f, big_i, big_h)))
    w_pooler = cut(m, 4 * h + 2 * f * c.ffn_pairs, h, big_h, big_h)
    order = {"cycle": [0, 1, 0, 1], "sequence": [0, 0, 1, 1] if c.num_hidden_layers == 4 else [0, 1]}[c.ffn_order]
    d = big_h // c.num_attention_heads
    scale = d ** (-2 / 3) if c.attention_scale == "authors" else d ** (-1 / 2)

    all_hidden, all_pooled, all_logits = [], [], []
    for row, row_mask, row_types in zip(tokens, mask, types, strict=True):
        xs = []
        for position, (token, kind) in enumerate(zip(row.tolist(), row_types.tolist(), strict=True)):
            x = e[token]
            if veps:
                x = layer_norm(x, p, "sharebert.pre_factor_norm", c.layer_norm_eps)
                x = p["sharebert.factor_linear.weight"] @ x + p["sharebert.factor_linear.bias"]
            x = layer_norm(x, p, "sharebert.pos_factor_norm", c.layer_norm_eps)
            x = x + p["sharebert.position_embeddings.weight"][position]
            xs.append(x + p["sharebert.token_type_embeddings.weight"][kind])
        for n in range(c.num_hidden_layers):
            of_layer = f"sharebert.layers.{n}."
            w_in, w_out = pairs[order[n] if len(pairs) == 2 else 0]
            gains = p[of_layer + "branch_gains"] if c.learned_branch_gains else [c.branch_gain or 1.0] * 2
            ys = [layer_norm(x, p, of_layer + "attention_norm", c.layer_norm_eps) for x in xs]
            q = [y @ w_query + p[of_layer + "query_bias"] for y in ys]
            k = [y @ w_key + p[of_layer + "key_bias"] for y in ys]
            v = [y @ w_value + p[of_layer + "value_bias"] for y in ys]
            for at in range(len(xs)):
                heads = []
                for head in range(c.num_attention_heads):
                    part = slice(head * d, (head + 1) * d)
                    seen = [s for s in range(len(xs)) if row_mask[s]]
                    weights = [torch.exp((q[at][part] @ k[s][part]) * scale) for s in seen]
                    total = torch.stack(weights).sum()
                    parts = [w / total * v[s][part] for w, s in zip(weights, seen, strict=True)]
                    heads.append(torch.stack(parts).sum(0))
                xs[at] = xs[at] + gains[0] * (torch.cat(heads) @ w_attention + p[of_layer + "attention_output_bias"])
            for at in range(len(xs)):
                y = layer_norm(xs[at], p, of_layer + "ffn_norm", c.layer_norm_eps)
                inner = gelu(y @ w_in + p[of_layer + "intermediate_bias"])
                xs[at] = xs[at] + gains[1] * (inner @ w_out + p[of_layer + "output_bias"])
        xs = [layer_norm(x, p, "sharebert.final_norm", c.layer_norm_eps) for x in xs]
        scores = []
        for x in xs:
            t = layer_norm(
                gelu(p["mlm_head.dense.weight"] @ x + p["mlm_head.dense.bias"]), p, "mlm_head.norm", c.layer_norm_eps
            )
            scores.append(e @ t + p["mlm_head.bias"] if c.mlm_head == "tied" else p["mlm_head.decoder.weight"] @ t)
        all_hidden.append(torch.stack(xs))
        all_pooled.append(xs[0] @ w_pooler + p["sharebert.pooler_bias"])
        all_logits.append(torch.stack(scores))
    return torch.stack(all_hidden), torch.stack(all_pooled), torch.stack(all_logits)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """A model's shape that fits: 5h + 2f ≤ H holds where V ≥ 7·max(H, I) + slack for rounding up."""
    heads, head_size = draw(st.integers(1, 3)), draw(st.integers(3, 6))
    hidden = max(heads * head_size, 8 * heads)
    hidden -= hidden % heads
    inner = draw(st.integers(hidden // 2, 2 * hidden))
    least = 7 * hidden if hidden > 12 else hidden * hidden
    sharing = draw(st.sampled_from(["veps", "eps"]))
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": draw(st.integers(max(least, 5 * hidden + 2 * inner) * 2, 12 * hidden * 2)),
        "vocab_pad_multiple": draw(st.sampled_from([1, 8])),
        "factor_size": hidden if sharing == "eps" else draw(st.integers(2, 9)),
        "sharing": sharing,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "mlm_head": draw(st.sampled_from(["untied", "tied"])),
        "attention_scale": draw(st.sampled_from(["authors", "standard"])),
        "max_position_embeddings": 6,
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=shapes(),
    rows=st.integers(1, 2),
    length=st.integers(1, 5),
    padding=st.integers(0, 2),
    path=st.sampled_from(PATHS),
)
def test_model_is_its_equations(shape: dict[str, Any], rows: int, length: int, padding: int, path: str) -> None:
    with kernels_of(path):
        check_equations(shape, rows, length, padding)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "changes",
    [
        {"branch_gain": 0.3},
        {"branch_gain": 0.3, "learned_branch_gains": True, "mlm_head": "tied"},
        {"ffn_pairs": 2, "num_hidden_layers": 4, "branch_gain": 0.3, "learned_branch_gains": True},
        {"ffn_pairs": 2, "num_hidden_layers": 4, "ffn_order": "sequence", "sharing": "eps", "mlm_head": "tied"},
    ],
)
def test_gains_and_a_second_pair_are_their_equations(changes: dict[str, Any], path: str) -> None:
    with kernels_of(path):
        check_equations({"vocab_size": 500, **changes}, rows=2, length=4, padding=2)


def check_equations(shape: dict[str, Any], rows: int, length: int, padding: int) -> None:
    model: ShareBertForMaskedLM = tiny_model(**shape).double()
    p = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(rows + 10 * length)
    tokens = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    types = torch.randint(2, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, max(1, length - padding) :] = 0

    encoded = model.sharebert(tokens, mask, types)
    logits = model.logits(tokens, mask, types)
    expected = naive(model.config, p, tokens, mask, types)
    assert encoded.pooled is not None
    for a, b in zip((encoded.hidden, encoded.pooled, logits), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    positions = mask.flatten().nonzero().flatten()
    labels = tokens.flatten()[positions].roll(1)
    output = model(
        tokens,
        mask,
        types,
        positions=positions,
        labels=labels,
        loss_weights=torch.ones(len(positions), dtype=torch.float64),
    )
    naive_loss = -sum(
        torch.log(torch.softmax(expected[2].flatten(0, 1)[i], 0)[label])
        for i, label in zip(positions.tolist(), labels.tolist(), strict=True)
    )
    assert isinstance(naive_loss, Tensor)
    torch.testing.assert_close(output.loss_sum, naive_loss, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(output.loss_sum, list(p.values()), allow_unused=True)
    theirs = torch.autograd.grad(naive_loss, list(p.values()), allow_unused=True)
    for name, a, b in zip(p, ours, theirs, strict=True):
        zero = torch.zeros_like(p[name])
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-8, atol=1e-9, msg=name)
