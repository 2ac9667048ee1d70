"""The tables of docs/performance.md: FLOPs and hours of the published sizes, and the bytes that kernels must move.

`python -m pretrain.plan` prints them.
"""

from __future__ import annotations

import torch

from pretrain.flops import flops_per_token, made_elements
from pretrain.plan.gpus import GPUS
from sharebert import SIZES, ShareBertConfig, ShareBertForMaskedLM

DOCUMENTED_GPUS = ("a100", "h100")
"""The GPUs of the tables."""

UTILISATIONS = (0.40, 0.55, 0.70)
"""Shares of a GPU's peak that plans are made for."""

AUTHORS_TOKENS = 23_000 * 4_000 * 128
"""Steps, rows and tokens of the authors' pretraining."""


def count_parameters(config: ShareBertConfig) -> int:
    """Learned numbers of the model, head included."""
    with torch.device("meta"):
        return sum(p.numel() for p in ShareBertForMaskedLM(config).parameters())


def traffic(config: ShareBertConfig, mask_rate: float, seq_len: int) -> dict[str, tuple[float, int]]:
    """Bytes that each fused operation must move in bf16, a token: {name: (bytes a token, times a step)}.

    Each input is read once and each output written once. What a kernel reads again is counted where it does not fit
    into registers (the logits: a row is read for its sum, then again for its gradient). The times are per micro-batch.
    The last two do not grow with the tokens: their bytes are of a micro-batch, or of an optimizer step.
    """
    hidden, inner, layers = config.hidden_size, config.inner_size, config.num_hidden_layers
    matrices = made_elements(config)
    return {
        "dropout + add + LayerNorm, forward": (2 * 4 * hidden, 2 * layers + 1),
        "dropout + add + LayerNorm, backward": (2 * 5 * hidden, 2 * layers + 1),
        "bias + GELU, forward": (2 * 2 * inner, layers),
        "bias + GELU, backward": (2 * 3 * inner, layers),
        "attention, forward": (2 * 4 * hidden, layers),
        "attention, backward": (2 * 8 * hidden, layers),
        "cross-entropy and its gradient": (2 * 3 * config.vocab_size * round(mask_rate * seq_len) / seq_len, 1),
        "virtual weights, forward and backward, a micro-batch": (2 * 2 * matrices, 1),
        "AdamW with fp32 masters, an optimizer step": (30 * count_parameters(config), 1),
    }


def kernel_table(size: str, rows: int, seq_len: int = 128, mask_rate: float = 0.15) -> str:
    """Bytes and floors of `traffic` for a micro-batch of a published size, as Markdown."""
    lines = [
        f"| {size}, {rows} x {seq_len} tokens, bf16 | times | MB each | "
        + " | ".join(f"{gpu.upper()}, µs each | {gpu.upper()}, ms in all" for gpu in DOCUMENTED_GPUS)
        + " |",
        "|---" + "|---:" * (2 + 2 * len(DOCUMENTED_GPUS)) + "|",
    ]
    for name, (size_bytes, times) in traffic(ShareBertConfig.from_dict(SIZES[size]), mask_rate, seq_len).items():
        moved = size_bytes * (1 if name.endswith(("a micro-batch", "an optimizer step")) else rows * seq_len)
        floors = [moved / GPUS[gpu].bandwidth for gpu in DOCUMENTED_GPUS]
        cells = " | ".join(f"{floor * 1e6:.0f} | {floor * times * 1e3:.2f}" for floor in floors)
        lines.append(f"| {name} | {times} | {moved / 1e6:.1f} | {cells} |")
    return "\n".join(lines)


def speed_table(rows: int, seq_len: int = 128, mask_rate: float = 0.15) -> str:
    """FLOPs a token of the published sizes, and what shares of a GPU's peak would mean, as Markdown."""
    lines = [
        "| | MFLOPs a token | GPU | peak, TFLOP/s | "
        + " | ".join(f"{share:.0%}: tokens/s | GPU-hours" for share in UTILISATIONS)
        + " |",
        "|---|---:|---|---:" + "|---:|---:" * len(UTILISATIONS) + "|",
    ]
    for size, settings in SIZES.items():
        per_token = flops_per_token(ShareBertConfig.from_dict(settings), seq_len, mask_rate, rows * seq_len)
        for gpu in DOCUMENTED_GPUS:
            rates = [share * GPUS[gpu].peak_flops / per_token for share in UTILISATIONS]
            cells = " | ".join(f"{rate:,.0f} | {AUTHORS_TOKENS / rate / 3600:.1f}" for rate in rates)
            lines.append(
                f"| {size} | {per_token / 1e6:,.1f} | {gpu.upper()} | {GPUS[gpu].peak_flops / 1e12:.0f} | {cells} |"
            )
    return "\n".join(lines)


DOCUMENTED_ROWS = 64
"""Rows of a micro-batch in the tables of docs/performance.md: those of the published recipes."""


def documented_tables() -> list[str]:
    """The tables of docs/performance.md."""
    return [speed_table(DOCUMENTED_ROWS), *(kernel_table(size, DOCUMENTED_ROWS) for size in SIZES)]
