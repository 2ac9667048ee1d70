"""Predicted and measured time of the structures that `prune_to_latency` takes: random weights, one thread.

    python -m benchmarks.latency_target [ROWSxTOKENS] [SIZE]

Prints a row for each target: what stays, and the time as a share of the whole model's, predicted by the table and
measured anew. SIZE is that of a model (sharebert-small), the batch 1x32 unless given. The structures are those that the
step would take if the loss grew by the square of the removed share of heads, of columns and of layers.
"""

from __future__ import annotations

import sys

import torch

from compress.prune.latency_table import config_of, measure_table
from compress.prune.structure_search import Ranking, candidates
from compress.shape_times import Call, batch_shape, shape_times
from sharebert import SIZES, ShareBertConfig

TARGETS = (0.75, 0.5, 0.25)


def ranking(parts: int) -> Ranking:
    """The cost of removing k of n parts is (k / n)²."""
    return Ranking(list(range(parts - 1)), (torch.arange(parts) / parts) ** 2)


def main() -> None:
    """Measure the table, then the structures, and print both."""
    rows, tokens = map(int, batch_shape(sys.argv[1] if len(sys.argv) > 1 else "1x32").split("x"))
    size = SIZES[sys.argv[2] if len(sys.argv) > 2 else "sharebert-small"]
    config, call = ShareBertConfig.from_dict({**size, "mlm_head": "none"}), Call(rows, tokens, 1)
    table = measure_table(config, call)
    print("{} heads, {} columns, {} layers:".format(*table.whole), f"{table.ms:.1f} ms")
    rankings = [ranking(parts) for parts in table.whole]
    shapes = [candidates(rankings, table, target)[0].shape for target in TARGETS]
    whole_ms, *found = shape_times([config, *(config_of(config, shape) for shape in shapes)], call)
    for target, shape, ms in zip(TARGETS, shapes, found, strict=True):
        predicted, measured = table.of(shape), ms / whole_ms
        parts = f"{shape.heads} | {shape.columns} | {shape.layers}"
        print(f"| {target} | {parts} | {predicted:.3f} | {measured:.3f} | {predicted / measured - 1:+.1%} |")


if __name__ == "__main__":
    main()
