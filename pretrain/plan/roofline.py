"""The roofline of a micro-batch, part by part: FLOPs or bytes, and the time of each at stated shares of a GPU's peaks.

Parts run one after the other (Williams et al., CACM 2009). FLOPs and bytes are counted from the operations of this
project; the shares are estimates, until a GPU has measured them.
"""

from __future__ import annotations

from typing import NamedTuple

from pretrain.flops import flops_per_token, generated_elements, made_elements
from pretrain.plan.gpus import GPUS, Gpu
from pretrain.plan.tables import traffic
from sharebert import SIZES, ShareBertConfig
from sharebert.kernels import CHUNK_LOGITS

PRODUCTS = 0.67
"""Share of the peak that the products of layers and head reach."""

MOVES = 0.75
"""Share of the memory's bandwidth that kernels reach which move much and compute little."""

ATTENTION = 0.48
"""The same of attention's kernels: in rows of 128 tokens they compute in small tiles."""

REST_S = 1e-3
"""Seconds of a micro-batch for all that is not counted: embeddings, casts, launches."""


class Part(NamedTuple):
    """One part of a micro-batch, forward and backward."""

    name: str
    flops: float
    """0 for a part that moves bytes."""
    moved: float
    """Bytes of memory read and written; 0 for a part that computes."""
    share: float
    """Estimated share of the peak, or of the bandwidth, that it reaches."""

    def seconds(self, gpu: Gpu) -> float:
        """Its estimated time."""
        return (self.flops / gpu.peak_flops + self.moved / gpu.bandwidth) / self.share


def parts(config: ShareBertConfig, rows: int, seq_len: int, mask_rate: float) -> list[Part]:
    """The parts of a micro-batch of `rows` rows in bf16, without the optimizer."""
    hidden, layers, words = config.hidden_size, config.num_hidden_layers, config.vocab_size
    matrices, made, tokens = generated_elements(config), made_elements(config), rows * seq_len
    masked = rows * max(1, round(mask_rate * seq_len))
    chunks = -(-masked * words // CHUNK_LOGITS["cuda"])
    moved = {
        name: size * times * tokens
        for name, (size, times) in traffic(config, mask_rate, seq_len).items()
        if not name.endswith(("a micro-batch", "an optimizer step"))
    }

    def both(name: str) -> float:
        return moved[f"{name}, forward"] + moved[f"{name}, backward"]

    return [
        Part("products of the layers", 6 * layers * matrices * tokens, 0, PRODUCTS),
        Part("products of the head", 6 * masked * hidden * (hidden + words), 0, PRODUCTS),
        Part("dropout, sums and norms", 0, both("dropout + add + LayerNorm"), MOVES),
        Part("attention", 0, both("attention"), ATTENTION),
        Part("bias and GELU", 0, both("bias + GELU"), MOVES),
        Part("cross-entropy", 0, moved["cross-entropy and its gradient"], MOVES),
        # Each gradient of query, key, value and of the two outputs is read once more.
        Part("sums for five biases a layer", 0, 5 * 2 * hidden * layers * tokens, MOVES),
        # Two of the three products add to what the one before wrote.
        Part("input gradient of query, key and value", 0, 2 * 2 * hidden * layers * tokens, MOVES),
        # fp32: the first use writes them, which counts as part of its products; each other one reads and writes.
        Part("weight gradients added up over layers", 0, 8 * (layers * matrices - made), MOVES),
        # fp32 [V, H]: written by the first chunk, read and written by others; scaled in place; then cast to bf16.
        Part("decoder gradient", 0, (4 + 8 * (chunks - 1) + 8 + 6) * words * hidden, MOVES),
        # bf16: slab written and read, matrices written; fp32 gradients read, slab written, and read three times.
        Part("virtual weights", 0, (3 * 2 + 4 + 4 * 2) * made, MOVES),
    ]


CASES = (("sharebert-small", 64), ("sharebert-small", 500), ("sharebert-large", 64), ("sharebert-large", 500))
"""Sizes and rows of the documented table."""


def roofline_table(gpu: str = "h100", seq_len: int = 128, mask_rate: float = 0.15) -> str:
    """The roofline of `CASES` as Markdown, every number an estimate: milliseconds, and the share of the peak."""
    kind = GPUS[gpu]
    columns: list[list[str]] = []
    for size, rows in CASES:
        config, tokens = ShareBertConfig.from_dict(SIZES[size]), rows * seq_len
        of = parts(config, rows, seq_len, mask_rate)
        times = [part.seconds(kind) for part in of]
        total = sum(times) + REST_S
        computed = tokens * flops_per_token(config, seq_len, mask_rate, tokens)
        cells = [f"{seconds * 1e3:.1f}" for seconds in (*times, REST_S, total)]
        columns.append([*cells, f"{computed / total / kind.peak_flops:.0%}"])
    names = [*(part.name for part in of), "rest", "total", f"share of {kind.peak_flops / 1e12:.0f} TFLOP/s"]
    header = [f"{size.removeprefix('sharebert-')}, {rows} x {seq_len}" for size, rows in CASES]
    lines = [
        f"| estimated, one {kind.title}, ms a micro-batch | " + " | ".join(header) + " |",
        "|---" + "|---:" * len(CASES) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(cells) + " |" for name, cells in zip(names, zip(*columns, strict=True), strict=True)
    ]
    return "\n".join(lines)
