"""Teachers of the tests of distillation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import train_arguments, train_many

from pretrain.export.consolidate import consolidate

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def bert(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with an MLM head and the dataset's vocabulary: width 24, 4 layers, 3 heads."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=301, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    shutil.copy(dataset / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def export(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ShareBERT that was trained for 4 steps: width 48, 3 layers, 4 heads."""
    folder = tmp_path_factory.mktemp("teacher")
    keys = {"model__hidden_size": 40, "model__num_hidden_layers": 3, "model__vocab_pad_multiple": 480, "steps": 4}
    train_many([{"overrides": train_arguments(dataset, folder / "run", **keys)}], 1, folder)
    consolidate(folder / "run", folder / "export")
    return folder / "export"
