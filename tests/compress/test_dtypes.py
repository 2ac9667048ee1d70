"""What a step does not make anew keeps the dtype of its source."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import tiny_export, tokens_of

from compress.low_rank.factor_step import LowerFactor
from compress.low_rank.pc_lora_step import PcLora
from compress.prune.structure_step import PruneStructure
from compress.prune.weights_step import PruneWeights
from compress.source import open_source
from exports.compact import Compact
from exports.forms import write_export
from exports.read import read_config, read_export
from exports.weight_source import all_tensors

STEPS = {
    "heads, columns and layers": (PruneStructure(heads=2, columns=0.5, layers=2), ("kept_",)),
    "the factor size": (LowerFactor(size=4, gauge="hessians"), ("factor_expansion",)),
    "zeros": (PruneWeights(sparsity=0.5, method="magnitude", centre=True), ()),
    "low-rank products": (PcLora(rank=4, steps=2), ("sharing.",)),
}
"""A step, and what stands in the names of tensors that its source does not have."""


@pytest.mark.parametrize(("step", "new"), STEPS.values(), ids=STEPS)
def test_tensors_keep_their_dtype(tmp_path: Path, step: Any, new: tuple[str, ...]) -> None:
    write_export(read_export(tiny_export(tmp_path / "source")), tmp_path / "half", Compact(torch.bfloat16))
    tokens = tokens_of(read_config(tmp_path / "half"), rows=16)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tools = SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch, say=lambda line: None)
    step.apply(open_source(tmp_path / "half"), tools, tmp_path / "out")
    tensors = all_tensors(read_export(tmp_path / "out").weights)
    wide = {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert all(any(part in name for part in new) for name in wide)
