"""Masked-LM loss and time of a trained model in the dense form: the step `awq`, and torchao's weights of few bits.

    python -m benchmarks.dense_peers EXPORT DATASET [--rows 1024] [--group 128] [--repeats 20]

EXPORT is compact. All rows quantise the matrices of the layers alone. The loss is that of the report of `sharebert
compress`; the time is the median of calls with 1 x 16 tokens on one thread. Needs `pip install torchao
compressed-tensors`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.dense.awq import Awq
from compress.recipe import CompressRecipe, RowsRecipe
from compress.source import open_hub_model
from compress.step import Source
from compress.tools import MASK_RATE, ByLogits, RecipeTools, open_rows
from exports.dense import Dense
from exports.forms import write_export
from exports.read import read_export
from pretrain.objective import MaskedLanguageModelling
from pretrain.validate import ValidateRecipe, validate


def loss(model: Any, rows: RowsRecipe, folder: Path) -> float:
    objective = MaskedLanguageModelling(torch.device("cpu"))
    called = ByLogits(lambda tokens, mask: model(input_ids=tokens, attention_mask=mask).logits)
    dataset = open_rows("validation", rows, folder)
    return validate(
        objective, called, [dataset], ValidateRecipe(rows=rows.rows), mask_rate=MASK_RATE, whole_word=False
    ).loss


def milliseconds(model: Any, repeats: int) -> float:
    ids = torch.randint(1000, 20000, (1, 16), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.no_grad():
        for _ in range(repeats + 3):
            began = time.perf_counter()
            model(input_ids=ids)
            times.append(time.perf_counter() - began)
    return statistics.median(times[3:]) * 1e3


def in_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "encoder.layer." in name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Int8Dynamic
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    rows = RowsRecipe(dataset=args.dataset, rows=args.rows)
    with tempfile.TemporaryDirectory() as place:
        dense = Path(place) / "dense"
        write_export(read_export(args.export), dense, Dense())
        reference = loss(open_hub_model(dense, "MaskedLM"), rows, dense)

        def show(name: str, model: Any) -> None:
            found = loss(model, rows, dense)
            change = 100 * (found / reference - 1)
            print(f"{name:44} {found:.4f}  {change:+.2f} %  {milliseconds(model, args.repeats):.2f} ms", flush=True)

        def torchao(config: Any) -> Any:
            model = open_hub_model(dense, "MaskedLM")
            quantize_(model, config, filter_fn=in_layers)
            return model

        def own(**keys: Any) -> Any:
            out = Path(place) / "-".join(f"{key}-{value}" for key, value in keys.items())
            tools = RecipeTools(CompressRecipe(steps=["awq"], calibration=rows), dense, Path(place), lambda _: None)
            Awq(group=args.group, **keys).apply(Source(dense, "dense"), tools, out)
            return open_hub_model(out, "MaskedLM")

        def intx(bits: int) -> Any:
            return torchao(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(args.group)))

        peers: dict[str, Callable[[], Any]] = {
            "fp32": lambda: open_hub_model(dense, "MaskedLM"),
            "torchao, int8 weights": lambda: torchao(Int8WeightOnlyConfig()),
            "torchao, int8 weights and activations": lambda: torchao(Int8Dynamic()),
            "awq, 8 bits": lambda: own(bits=8),
        }
        for bits in (4, 3):
            peers |= {
                f"torchao, IntxWeightOnly, {bits} bits": lambda bits=bits: intx(bits),
                f"plain rounding, {bits} bits": lambda bits=bits: own(bits=bits, scale=False, clip=False),
                f"clips alone, {bits} bits": lambda bits=bits: own(bits=bits, scale=False),
                f"awq, {bits} bits": lambda bits=bits: own(bits=bits),
            }
        for name, make in peers.items():
            show(name, make())


if __name__ == "__main__":
    main()
