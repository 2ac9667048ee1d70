"""How CUDA's products round and whether they repeat: the settings, which a build without CUDA has too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from pretrain.engine.numerics import set_numerics


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, fill = torch.backends.cuda.matmul, torch.utils.deterministic.fill_uninitialized_memory
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_long_sums_stay_in_fp32() -> None:
    set_numerics(0.1, deterministic=False)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, True), (0.1, False), (0.125, True), (0.0625, True), (0.05, False)])
def test_cudnn_attention_only_where_it_does_not_round_the_dropout(dropout: float, kept: bool) -> None:
    set_numerics(dropout, deterministic=False)
    assert torch.backends.cuda.cudnn_sdp_enabled() == kept


def test_deterministic() -> None:
    set_numerics(0.0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
