"""Time of a forward pass in evaluation, with generated matrices that are kept, against making them in every pass.

    python -m benchmarks.inference [--size sharebert-small] [--tokens 16] [--rows 1] [--rounds 7] [--threads 1]

A round runs both in turn; a ratio is the median over the rounds. The weights are random: they do not change the time.
The bar is a ratio of at most 0.65 for 1 row of 16 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sharebert import SIZES, ShareBert, ShareBertConfig


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sharebert-small", choices=list(SIZES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode(False):
        encoder = ShareBert(ShareBertConfig(**SIZES[args.size])).eval()
    tokens = torch.randint(1000, (args.rows, args.tokens))
    encoder(tokens)
    kept, made = [], []
    for _ in range(args.rounds):
        kept.append(milliseconds(lambda: encoder(tokens)))
        encoder.forget_weights()
        made.append(milliseconds(lambda: encoder(tokens)))
    ratio = statistics.median(a / b for a, b in zip(kept, made, strict=True))
    shape = f"{args.rows} x {args.tokens} tokens, {args.threads} threads"
    print(f"{args.size}, {shape}: kept {statistics.median(kept):.0f} ms, made {statistics.median(made):.0f} ms")
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
