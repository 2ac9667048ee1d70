"""Masked-LM loss of a trained model in ONNX, fp32 and int8 in several ways, on the same masked validation rows.

    python -m benchmarks.onnx_accuracy EXPORT DATASET [--rows 256] [--calibration-rows 64]

Every seventh word of a validation row, beginning with the third token, is replaced by [MASK]; the loss is the mean over
them, in nats. The `all but` rows quantise everything but one kind of product, to show which one does harm.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.dense.onnx_int8 import OnnxInt8, kind_of, nodes_with_weights
from compress.dense.runtime import OnnxModel, batches
from compress.dense.smooth import smooth
from data_prep.shards.reader import open_dataset
from exports.onnx import write_onnx
from exports.read import load_model


def rows_of(dataset: str, split: str, count: int) -> Tensor:
    """The first rows of a split, int64 [rows, length]."""
    tokens, _ = open_dataset(dataset).split(split).read(np.arange(count))
    return torch.from_numpy(tokens.astype(np.int64))


def loss(file: Path, rows: Tensor, mask_id: int) -> float:
    model = OnnxModel(file)
    places = torch.zeros_like(rows, dtype=torch.bool)
    places[:, 2::7] = True
    places &= rows > mask_id  # the special tokens of the shipped vocabularies have the smallest ids
    total = torch.zeros((), dtype=torch.float64)
    for part, chosen in zip(rows.split(32), places.split(32), strict=True):
        scores = model.logits(part.masked_fill(chosen, mask_id), (part != 0).long())
        total += F.cross_entropy(scores[chosen], part[chosen], reduction="sum").double()
    return (total / places.sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--calibration-rows", type=int, default=64)
    args = parser.parse_args()
    mask_id = open_dataset(args.dataset).manifest["special_ids"]["mask"]
    rows = rows_of(args.dataset, "validation", args.rows)
    inputs = list(batches(rows_of(args.dataset, "train", args.calibration_rows), pad=0))
    with tempfile.TemporaryDirectory() as folder:
        full, smoothed, small = (Path(folder) / name for name in ("fp32.onnx", "smooth.onnx", "int8.onnx"))
        write_onnx(full, load_model(args.export))
        smooth(full, smoothed, inputs, 0.5)
        reference = loss(full, rows, mask_id)
        print(f"{'fp32':60} {reference:.4f}  {full.stat().st_size / 1e6:.2f} MB", flush=True)

        def show(name: str, step: OnnxInt8, source: Path, kept: list[str]) -> None:
            step.write(source, small, kept, inputs)
            found = loss(small, rows, mask_id)
            size = small.stat().st_size / 1e6
            print(f"{name:60} {found:.4f}  {100 * (found / reference - 1):+.2f} %  {size:.2f} MB", flush=True)

        show("dynamic, a scale for each matrix", OnnxInt8(per_channel=False), full, [])
        show("dynamic, a scale for each channel", OnnxInt8(), full, [])
        show("the same, smoothed with 0.5", OnnxInt8(), smoothed, [])
        show("static, a scale for each channel", OnnxInt8(mode="static"), full, [])
        show("the same, smoothed with 0.5", OnnxInt8(mode="static"), smoothed, [])
        for kind in sorted({kind_of(name) for name in nodes_with_weights(full)}):
            show(f"dynamic, all but {kind}", OnnxInt8(), full, [kind])


if __name__ == "__main__":
    main()
