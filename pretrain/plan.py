"""What a run will cost, before it runs: parameters, memory per ZeRO stage, FLOPs a token, hours.

`python -m pretrain.plan` prints the tables of docs/performance.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pretrain.flops import PEAK_FLOPS, flops_per_token, generated_elements
from sharebert import SIZES, ShareBertConfig, ShareBertForMaskedLM
from sharebert_common.errors import BadInput, nearest

if TYPE_CHECKING:
    from pretrain.recipe import TrainRecipe

BANDWIDTH = {"a100": 2.039e12, "h100": 3.35e12}
"""Bytes/s of a GPU's memory, from the makers' data sheets (A100 80 GB SXM, H100 SXM)."""

PLAN_DEFAULTS = {"run": "(not given)", "data": {"dataset": "(not given)"}}
"""Keys that a plan can do without."""

UTILISATIONS = (0.40, 0.55, 0.70)
"""Shares of a GPU's peak that plans are made for."""

AUTHORS_TOKENS = 23_000 * 4_000 * 128
"""Steps, rows and tokens of the authors' pretraining."""


def count_parameters(config: ShareBertConfig) -> int:
    """Learned numbers of the model, head included."""
    with torch.device("meta"):
        return sum(p.numel() for p in ShareBertForMaskedLM(config).parameters())


def state_bytes(parameters: int, world_size: int, stage: int, precision: str) -> int:
    """Bytes on each rank for weights, gradients and Adam's fp32 state (Rajbhandari et al. 2020, section 3.1)."""
    working = 2 if precision != "fp32" and stage else 4
    whole = {"weights": working, "gradients": 4, "optimizer": 8 if stage == 0 else 12}
    split = {0: (), 1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}[stage]
    return sum(-(-parameters * size // (world_size if part in split else 1)) for part, size in whole.items())


def report(recipe: TrainRecipe, gpus: int, gpu: str) -> str:
    """The plan of a recipe on `gpus` devices of a kind in PEAK_FLOPS, as text. Raises BadInput."""
    if gpu not in PEAK_FLOPS:
        raise BadInput(f"--gpu: no '{gpu}' known{nearest(gpu, PEAK_FLOPS)} (known: {', '.join(PEAK_FLOPS)})")
    training = recipe.resolve(gpus, needs_data=False)
    config, seq_len, micro_rows = training.model.config, training.seq_len, training.micro_rows
    per_token = flops_per_token(config, seq_len, recipe.data.highest_mask_rate, micro_rows * seq_len)
    tokens = recipe.steps * recipe.data.global_batch * seq_len
    parameters = count_parameters(config)
    lines = [
        f"parameters            {parameters:,}",
        f"tokens                {tokens:,} ({recipe.steps:,} steps of {recipe.data.global_batch:,} rows of {seq_len})",
        f"on each of {gpus} ranks    {training.micro_batches} micro-batches of {micro_rows} rows a step",
        f"FLOPs a token         {per_token / 1e6:,.1f} M",
    ]
    for stage in range(4):
        held = state_bytes(parameters, gpus, stage, recipe.precision)
        lines.append(f"ZeRO {stage}: weights, gradients and moments on each rank  {held / 2**20:,.0f} MiB")
    for utilisation in UTILISATIONS:
        rate = gpus * PEAK_FLOPS[gpu] * utilisation / per_token
        hours = tokens / rate / 3600
        lines.append(f"at {utilisation:.0%} of {gpus} x {gpu}'s peak    {rate:,.0f} tokens/s, {hours:,.1f} hours")
    return "\n".join(lines)


def traffic(config: ShareBertConfig, mask_rate: float, seq_len: int) -> dict[str, tuple[float, int]]:
    """Bytes that each fused operation must move in bf16, a token: {name: (bytes a token, times a step)}.

    Each input is read once and each output written once. What a kernel reads again is counted where it does not fit
    into registers (the logits: a row is read for its sum, then again for its gradient). The times are per micro-batch.
    The last two do not grow with the tokens: their bytes are of a micro-batch, or of an optimizer step.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices = generated_elements(config)
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
        + " | ".join(f"{gpu.upper()}, µs each | {gpu.upper()}, ms in all" for gpu in BANDWIDTH)
        + " |",
        "|---" + "|---:" * (2 + 2 * len(BANDWIDTH)) + "|",
    ]
    for name, (size_bytes, times) in traffic(ShareBertConfig.from_dict(SIZES[size]), mask_rate, seq_len).items():
        moved = size_bytes * (1 if name.endswith(("a micro-batch", "an optimizer step")) else rows * seq_len)
        floors = [moved / bandwidth for bandwidth in BANDWIDTH.values()]
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
        for gpu in BANDWIDTH:
            rates = [share * PEAK_FLOPS[gpu] / per_token for share in UTILISATIONS]
            cells = " | ".join(f"{rate:,.0f} | {AUTHORS_TOKENS / rate / 3600:.1f}" for rate in rates)
            lines.append(
                f"| {size} | {per_token / 1e6:,.1f} | {gpu.upper()} | {PEAK_FLOPS[gpu] / 1e12:.0f} | {cells} |"
            )
    return "\n".join(lines)


DOCUMENTED_ROWS = 64
"""Rows of a micro-batch in the tables of docs/performance.md: those of the published recipes."""


def documented_tables() -> list[str]:
    """The tables of docs/performance.md."""
    return [speed_table(DOCUMENTED_ROWS), *(kernel_table(size, DOCUMENTED_ROWS) for size in SIZES)]


if __name__ == "__main__":
    print("\n\n".join(documented_tables()))
