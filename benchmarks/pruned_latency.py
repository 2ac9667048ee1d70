"""CPU time of sharebert-small's shape with fewer heads, columns, layers, hidden size, or a low rank: random weights.

    python -m benchmarks.pruned_latency [TOKENS]

Prints a row for each shape: milliseconds of the processor for one row of TOKENS words (32) in one thread, the least of
5 calls after two others, and the part of the whole model's. The dense shapes are transformers' own `megatron_bert`. The
processor's time changes less than the clock's on a busy machine.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

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

DENSE_SHAPES = {
    "whole, dense": (2048, 16, 4096),
    "half of the heads, of the columns and of the hidden size, dense": (1024, 8, 2048),
}
"""Hidden size, heads, columns."""


def milliseconds(config: ShareBertConfig, tokens: int) -> float:
    """Of the processor, for one call of the encoder in evaluation."""
    model = ShareBertForMaskedLM(config)
    initialize(model, "variance", 0)
    encoder = model.eval().sharebert
    return least(lambda words: encoder(words, pool=False), tokens)


def dense_milliseconds(hidden: int, heads: int, columns: int, tokens: int) -> float:
    """The same of the dense form, in transformers."""
    from transformers import MegatronBertConfig, MegatronBertModel

    config = MegatronBertConfig(
        vocab_size=SMALL.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=SMALL.num_hidden_layers,
        num_attention_heads=heads,
        intermediate_size=columns,
    )
    return least(MegatronBertModel(config, add_pooling_layer=False).eval(), tokens)


def least(encoder: Callable[[Tensor], object], tokens: int) -> float:
    """Milliseconds of the processor, the least of 5 calls after two others."""
    words = torch.randint(SMALL.vocab_size, (1, tokens))
    times = []
    with torch.inference_mode():
        for _ in range(7):  # the first call makes the matrices, which are kept
            start = time.process_time()
            encoder(words)
            times.append(time.process_time() - start)
    return 1000 * min(times[2:])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    found = {name: milliseconds(config, tokens) for name, config in SHAPES.items()}
    found |= {name: dense_milliseconds(*sizes, tokens) for name, sizes in DENSE_SHAPES.items()}
    for name, value in found.items():
        print(f"| {name} | {value:.0f} | {value / found['whole']:.3f} |")


if __name__ == "__main__":
    main()
