"""CPU time of the sharebert-small shape with fewer heads, columns, layers or a low rank: random weights, one thread.

    python -m benchmarks.pruned_latency [TOKENS]

Prints a row for each shape: milliseconds of the processor for one row of TOKENS words (32), the least of 5 calls after
two others, and the part of the whole model's. The processor's time changes less than the clock's on a busy machine.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import torch

from sharebert import SIZES, ShareBertConfig, ShareBertForMaskedLM, initialize

SMALL = ShareBertConfig.from_dict({**SIZES["sharebert-small"], "mlm_head": "none"})
HEADS, COLUMNS = tuple(range(8)), tuple(range(2048))

SHAPES = {
    "whole": SMALL,
    "half of the heads and of the columns": dataclasses.replace(SMALL, kept_heads=HEADS, kept_columns=COLUMNS),
    "half of the heads": dataclasses.replace(SMALL, kept_heads=HEADS),
    "half of the columns": dataclasses.replace(SMALL, kept_columns=COLUMNS),
    "half of the layers": dataclasses.replace(SMALL, num_hidden_layers=6),
    "factor size 96": dataclasses.replace(SMALL, factor_size=96, expanded_size=128),
    "rank 64": dataclasses.replace(SMALL, sharing="low_rank", rank=64),
}


def milliseconds(config: ShareBertConfig, tokens: int) -> float:
    """Of the processor, for one call of the encoder in evaluation."""
    model = ShareBertForMaskedLM(config)
    initialize(model, "variance", 0)
    encoder, words = model.eval().sharebert, torch.randint(config.vocab_size, (1, tokens))
    times = []
    with torch.inference_mode():
        for _ in range(7):  # the first call makes the matrices, which are kept
            start = time.process_time()
            encoder(words, pool=False)
            times.append(time.process_time() - start)
    return 1000 * min(times[2:])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    found = {name: milliseconds(config, tokens) for name, config in SHAPES.items()}
    for name, value in found.items():
        print(f"| {name} | {value:.0f} | {value / found['whole']:.3f} |")


if __name__ == "__main__":
    main()
