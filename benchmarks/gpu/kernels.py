"""Each operation of a layer on the device: its error against float64, its time beside the time to move its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import gradients_of, milliseconds
from pretrain.plan.tables import traffic
from sharebert import SIZES, ShareBertConfig
from sharebert.kernels import add_dropout_norm, attention, chunk_cross_entropy, linear_gelu, triton_for
from sharebert.virtual import blocks, generate, products_of

SEQ_LEN, MASK_RATE = 128, 0.15
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

Case = tuple[Callable[..., Any], list[torch.Tensor]]
"""An operation that returns a list of tensors, and its inputs."""


def config_of(device: str) -> ShareBertConfig:
    """sharebert-small; in a rehearsal a tiny model."""
    values: dict[str, Any] = dict(SIZES["sharebert-small"])
    if device != "cuda":
        values |= {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64, "factor_size": 16}
        values |= {"num_hidden_layers": 2, "vocab_size": 1000}
    return ShareBertConfig.from_dict(values)


def kernels(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Everything of this file, as one row each."""
    config, rows = config_of(device), 64 if device == "cuda" else 2
    rate = product_rate(device)
    yield {"what": "product rate", "shape": "8192 x 2048 x 2048", "tflops": rate / 1e12}
    yield from backends(device)
    yield from errors(config, device)
    yield from operations(config, rows, device)
    yield from virtual_weights(config, device)


def product_rate(device: str) -> float:
    """FLOP/s of a product [8192, 2048] · [2048, 2048] in bf16."""
    m, n = (8192, 2048) if device == "cuda" else (256, 64)
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((m, n), (n, n)))
    return 2 * m * n * n / (milliseconds(lambda: a @ b, device) / 1e3)


def backends(device: str) -> Iterator[dict[str, Any]]:
    """SDPA's backends with dropout 0.1: whether each runs, its time, and the share of probabilities that it drops.

    With value = identity the output is the probabilities themselves, so that the share of zeros is what was dropped.
    """
    shape = (64, 16, 128, 128) if device == "cuda" else (2, 2, 128, 128)
    q, k = (torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.1 for _ in range(2))
    identity = torch.eye(128, device=device, dtype=torch.bfloat16).expand(shape).contiguous()
    for name, backend in BACKENDS.items():
        row: dict[str, Any] = {"what": "SDPA, dropout 0.1", "backend": name}
        try:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, identity, dropout_p=0.1)
                took = milliseconds(lambda: F.scaled_dot_product_attention(q, k, identity, dropout_p=0.1), device)
            yield row | {"dropped": (out == 0).float().mean().item(), "ms": took}
        except RuntimeError as error:
            yield row | {"failed": str(error).splitlines()[0][:120]}


def errors(config: ShareBertConfig, device: str) -> Iterator[dict[str, Any]]:
    """Largest error of each operation and its gradients in bf16, relative to the largest value in float64."""
    for name, (run, inputs) in cases(config, 2, device, dropout=0.0).items():
        outputs = run(*inputs)
        given = [torch.randn_like(output) for output in outputs]
        found = [*outputs, *torch.autograd.grad(outputs, inputs, given, allow_unused=True)]
        exact_inputs = [value.detach().cpu().double().requires_grad_() for value in inputs]
        exact_outputs = run(*exact_inputs)
        exact_given = [value.cpu().double() for value in given]
        exact = [*exact_outputs, *torch.autograd.grad(exact_outputs, exact_inputs, exact_given, allow_unused=True)]
        worst = max(
            float((a.cpu().double() - b).abs().max() / b.abs().max())
            for a, b in zip(found, exact, strict=True)
            if a is not None and b is not None
        )
        yield {"what": "error against float64", "operation": name, "relative": worst}


def cases(config: ShareBertConfig, rows: int, device: str, dropout: float) -> dict[str, Case]:
    """The operations of a layer on `rows` rows, by the names of `pretrain.plan.tables.traffic`."""
    hidden, inner, heads, tokens = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        rows * SEQ_LEN,
    )

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()

    def norm(*given: torch.Tensor) -> list[torch.Tensor]:
        return list(add_dropout_norm(*given, 1e-5, dropout))

    def gelu(product: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        if fused := triton_for(product):
            return [fused.bias_gelu(product, bias)]
        return [F.gelu(product + bias)]

    def attend(*parts: torch.Tensor) -> list[torch.Tensor]:
        return [attention(*parts, None, 0.1, dropout)]

    return {
        "dropout + add + LayerNorm": (norm, [made(tokens, hidden), made(tokens, hidden), made(hidden), made(hidden)]),
        "bias + GELU": (gelu, [made(tokens, inner), made(inner)]),
        "attention": (attend, [made(rows, heads, SEQ_LEN, hidden // heads) for _ in range(3)]),
    }


def operations(config: ShareBertConfig, rows: int, device: str) -> Iterator[dict[str, Any]]:
    """Times, and the bandwidth that they reach. What a data sheet promises stands in docs/performance.md."""
    moved = traffic(config, MASK_RATE, SEQ_LEN)
    tokens, masked = rows * SEQ_LEN, rows * round(MASK_RATE * SEQ_LEN)
    timed: dict[str, float] = {}
    for name, (run, inputs) in cases(config, rows, device, dropout=0.1).items():
        timed[f"{name}, forward"] = milliseconds(lambda run=run, inputs=inputs: run(*inputs), device)
        backward = gradients_of(lambda run=run, inputs=inputs: run(*inputs), inputs)
        timed[f"{name}, backward"] = milliseconds(backward, device)
    logits = torch.randn(masked, config.vocab_size, device=device, dtype=torch.bfloat16)
    labels = torch.zeros(masked, dtype=torch.int64, device=device)
    weights = torch.ones(masked, device=device)
    fused = triton_for(logits)
    loss = fused.chunk_cross_entropy if fused else chunk_cross_entropy
    timed["cross-entropy and its gradient"] = milliseconds(lambda: loss(logits, None, labels, weights, True), device)
    for name, took in timed.items():
        yield {"what": "operation", "operation": name, "ms": took, "gb_per_s": moved[name][0] * tokens / took / 1e6}
    x = torch.randn(tokens, config.hidden_size, device=device, dtype=torch.bfloat16)
    w = torch.randn(config.hidden_size, config.intermediate_size, device=device, dtype=torch.bfloat16)
    b = torch.randn(config.intermediate_size, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        yield {
            "what": "operation",
            "operation": "linear + GELU",
            "ms": milliseconds(lambda: linear_gelu(x, w, b), device),
        }


def virtual_weights(config: ShareBertConfig, device: str) -> Iterator[dict[str, Any]]:
    """The six matrices, forward and backward, as a slab and block by block; and products of several widths.

    A row of 138 or 275 values in bf16 is no multiple of 16 bytes; 144 and 280 are, and so is a slab of all 1,104.
    """
    words, factor = config.vocab_size, config.factor_size
    e = torch.randn(words, factor, device=device, dtype=torch.bfloat16).requires_grad_()
    w = torch.randn(config.hidden_size, factor, device=device, dtype=torch.bfloat16).requires_grad_()
    b = torch.randn(config.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    cut = tuple(blocks(config).values())[:-1]
    yield {"what": "virtual weights", "forward ms": milliseconds(lambda: generate(cut, e, w, b), device),
           "backward ms": milliseconds(gradients_of(lambda: generate(cut, e, w, b), [e, w, b]), device)}  # fmt: skip
    if device == "cuda":  # what the slab is chosen over
        apart = lambda: products_of(e, w, b, cut, torch.bfloat16)  # noqa: E731
        yield {"what": "virtual weights by block", "forward ms": milliseconds(apart, device),
               "backward ms": milliseconds(gradients_of(apart, [e, w, b]), device)}  # fmt: skip
    widths = (138, 144, 275, 280, 1102, 1104) if device == "cuda" else (9, 16)
    detached = e.detach()
    for width in widths:
        part = torch.randn(width, factor, device=device, dtype=torch.bfloat16)
        gradient = torch.randn(words, width, device=device, dtype=torch.bfloat16)
        pairs = {"forward": (detached, part.t()), "to E": (gradient, part), "to W_all": (gradient.t(), detached)}
        times = {f"{name} ms": milliseconds(lambda a=a, b=b: a @ b, device) for name, (a, b) in pairs.items()}
        yield {"what": "product of a block", "columns": width, **times}
